"""Parts of a training run that follow from its config: evaluation, the check of the first batch,
rates.
"""

from collections.abc import Callable
from typing import Any

import jax

from research.data.batch import Batch
from research.data.objectives import bytes_per_target, encoder_length
from research.data.prepare import Prepared
from research.models.flops import train_flops_per_token
from research.recipes.experiment import ExperimentConfig
from research.recipes.inputs import heldout_rows
from research.scaling.devices import peak_flops
from research.training.evaluation import evaluate
from research.training.loop import Throughput
from research.training.program import Program
from research.training.self_check import check_attention
from research.training.state import TrainState
from research.training.step import shard_batch


def evaluation(
    config: ExperimentConfig,
    program: Program,
    frozen: Any,
    prepared: Prepared,
    part: tuple[int, int],
) -> Callable[[TrainState], dict[str, float]]:
    """Returns the held-out metrics of a state, as a function that is compiled."""
    step = program.compile_eval_step()
    text_size = (
        bytes_per_target(prepared.heldout) if config.data.objective.predicts_all_text else None
    )

    def held_out(state: TrainState) -> dict[str, float]:
        batches = (
            shard_batch(rows, program.batch) for rows in heldout_rows(config, prepared, part)
        )
        return evaluate(step, state.eval_params(), frozen, batches, text_size)

    return held_out


def first_batch_check(
    config: ExperimentConfig, program: Program, frozen: Any
) -> Callable[[TrainState, Batch], None]:
    """Returns what raises where the kernels cannot be trusted with a state and its batch."""

    def check(state: TrainState, batch: Batch) -> None:
        if config.train.self_check:
            check_attention(config.model, program.merge(state, frozen).params, batch, program.mesh)

    return check


def throughput(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> Throughput:
    """Returns what turns a step's time into rates."""
    length = config.train.sequence_length
    flops = train_flops_per_token(
        config.model, length, encoder_length(config.data.objective, length)
    )
    peak = peak_flops(mesh.devices.flat[0].device_kind, config.model.dtype)
    return Throughput(flops, None if peak is None else peak * mesh.size, mesh.size)

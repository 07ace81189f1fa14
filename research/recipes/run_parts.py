"""Parts of a training run that follow from its config: evaluation, the check of the first batch,
throughput, trackers.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any

import jax

from research.core import config as configs
from research.core.trees import count
from research.data.batch import Batch
from research.data.objectives import bytes_per_target, encoder_length
from research.data.prepare import Prepared
from research.data.tokenizers import Tokenizer
from research.models.flops import train_flops_per_token
from research.parallel.target import mesh_platform
from research.recipes.experiment import ExperimentConfig
from research.recipes.inputs import heldout_rows
from research.recipes.workdir import write_config
from research.scaling.cluster import parse_cluster
from research.scaling.devices import peak_flops
from research.storage.paths import Path
from research.training.evaluation import evaluate
from research.training.loop import Throughput
from research.training.mesh_checks import unused_schedule
from research.training.program import Program
from research.training.self_check import check_attention
from research.training.state import TrainState
from research.training.step import shard_batch
from research.training.trackers import Tracker, open_trackers

logger = logging.getLogger("tessera")


def log_model(program: Program, config: ExperimentConfig) -> None:
    """Logs how large the model is and where it runs, and a warning for each part of the config that
    is for another mesh than this one, as a pod's is on a laptop.
    """
    mesh = config.mesh
    parameters = count(program.saved.params)
    size = program.mesh.size
    platform = mesh_platform(program.mesh)
    logger.info("model: %s parameters on %d device(s)", f"{parameters:,}", size)
    unused = unused_schedule(config.train, program.mesh.shape["pipeline"])
    if unused is not None:
        logger.warning("%s", unused)
    if not mesh.devices:
        return
    cluster = parse_cluster(mesh.devices)
    if (cluster.num_devices, cluster.platform) != (size, platform):
        logger.warning(
            "mesh.devices = %r names others than the %d of this run, on %s.",
            mesh.devices,
            size,
            platform,
        )


def evaluation(
    config: ExperimentConfig,
    program: Program,
    frozen: Any,
    prepared: Prepared,
    part: tuple[int, int],
) -> Callable[[TrainState], dict[str, float]]:
    """Returns a function from a state to its held-out metrics, whose step is compiled here."""
    step = program.compile_eval_step()
    text_size = None
    if config.data.objective.predicts_all_text:
        text_size = bytes_per_target(prepared.heldout)

    def evaluate_state(state: TrainState) -> dict[str, float]:
        rows = heldout_rows(config, prepared, part)
        batches = (shard_batch(batch, program.batch) for batch in rows)
        return evaluate(step, state.eval_params(), frozen, batches, text_size)

    return evaluate_state


def first_batch_check(
    config: ExperimentConfig, program: Program, frozen: Any
) -> Callable[[TrainState, Batch], None]:
    """Returns a check that raises where the fast kernels differ from the plain ones on a batch."""

    def check(state: TrainState, batch: Batch) -> None:
        if config.train.self_check:
            params = program.merge(state, frozen).params
            check_attention(config.model, params, batch, program.mesh)

    return check


def throughput(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> Throughput:
    """Returns what converts the time of a step to rates."""
    length = config.train.sequence_length
    longest_encoder = encoder_length(config.data.objective, length)
    flops_per_token = train_flops_per_token(config.model, length, longest_encoder)

    # None where the peak of a device is unknown: then MFU is, too.
    peak = peak_flops(mesh.devices.flat[0].device_kind, config.model.dtype)
    if peak is not None:
        peak *= mesh.size
    return Throughput(flops_per_token, peak, mesh.size)


@contextlib.contextmanager
def start_trackers(
    config: ExperimentConfig, workdir: Path, tokenizer: Tokenizer
) -> Iterator[list[Tracker]]:
    """Opens the trackers of a run in a locked workdir as long as the context lasts. Once they are
    open, nothing else can be a user's mistake: the run's config and tokenizer are written there.

    Raises:
      UserError: a tracker that cannot be started; nothing is written.
    """
    with open_trackers(config.trackers, workdir, configs.plain(config)) as trackers:
        if jax.process_index() == 0:
            write_config(workdir, config)
            tokenizer.save(workdir / "tokenizer")
        yield trackers

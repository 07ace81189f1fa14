"""Runs of small models on meshes, to be compared with the run of one device."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research.core.trees import named_leaves
from research.data.objectives import ObjectiveConfig
from research.models.config import ModelConfig
from research.optim.optimizers import OptimConfig
from research.optim.schedules import ScheduleConfig
from research.parallel.mesh_config import MeshConfig
from research.parallel.process_parts import process_rows
from research.training.config import PipelineConfig, TrainConfig
from research.training.language_model import language_model_program
from research.training.program import Program
from research.training.step import shard_batch
from tests.models.variants import pack, rows
from tests.parallel.training_test import begin
from tests.tiny import random_params, random_tokens

STEPS, ROWS, LENGTH = 5, 8, 16
# Absolute below 1, relative above; in float64 (`tests.float64`) relative to the largest number of
# an array. There runs agree to 5e-12, so that what differs in float32 is rounding.
TOLERANCE = 1e-10 if jax.config.jax_enable_x64 else 1e-5
# Of the norm after the first step, whose gradients are taken at parameters that differ already: an
# encoder-decoder makes of 1e-6 in its first gradient 1e-5 of the fourth norm, as of 1e-14 in
# float64 4e-15.
LATER_NORM_TOLERANCE = 1e-10 if jax.config.jax_enable_x64 else 1e-4
CLIP_NORM = 0.5
# Rates at which steps move parameters by far more than the tolerance. Where a gradient is small
# beside epsilon, all but SGD amplify rounding: they are compared in float64 alone, here.
RATES = {"adamw": 1e-2, "adafactor": 1e-2, "lion": 1e-3, "sgd": 0.2, "muon": 1e-2}
EPSILON = 1e-3
OBJECTIVES = {
    "decoder": "causal",
    "encoder": "masked",
    "prefix": "prefix",
    "encoder_decoder": "span",
}


def host_batch(model: ModelConfig, index: int) -> dict[str, np.ndarray]:
    """Rows of two documents each, whose lengths and weights differ, with padding behind them."""
    packed = []
    for row in range(ROWS):
        documents = pack(rows(model, [3 + row % 4, 5], seed=100 * index + 10 * row), padding=0)
        packed.append(
            {name: np.pad(x, ((0, 0), (0, LENGTH - x.shape[1]))) for name, x in documents.items()}
        )
    batch = {
        name: np.concatenate([one[name] for one in packed]).astype(np.int32) for name in packed[0]
    }
    real = batch["segments"] != 0
    batch["weights"] = np.where(real, 0.5 + np.arange(ROWS)[:, None] / ROWS, 0).astype(np.float32)
    return batch | {"targets": random_tokens(ROWS, LENGTH, index)}


ONE_F_ONE_B = PipelineConfig()


class Run(NamedTuple):
    """The metrics of each step, and the state after the first step and after the last."""

    metrics: list[dict[str, float]]
    first: dict[str, np.ndarray]
    last: dict[str, np.ndarray]


def build(
    model: ModelConfig,
    mesh: MeshConfig,
    devices: Sequence[jax.Device] | None = None,
    accumulation: int = 1,
    pipeline: PipelineConfig = ONE_F_ONE_B,
    optimizer: str = "sgd",
) -> Program:
    """The programs of a run of a few steps."""
    optim = OptimConfig(
        name=optimizer,
        learning_rate=RATES[optimizer],
        epsilon=EPSILON,
        clip_norm=CLIP_NORM,
        schedule=ScheduleConfig(name="constant"),
    )
    config = TrainConfig(
        steps=STEPS,
        batch_size=ROWS,
        sequence_length=LENGTH,
        accumulation=accumulation,
        pipeline=pipeline,
    )
    objective = ObjectiveConfig(kind=OBJECTIVES[model.structure])
    return language_model_program(model, optim, config, mesh, devices, objective)


def train(
    model: ModelConfig, mesh: MeshConfig, devices: Sequence[jax.Device] | None = None, **options
) -> Run:
    """A run of a few steps; options as of `build`."""
    program = build(model, mesh, devices, **options)
    step = program.compile_train_step()
    state = begin(program.state, model)
    metrics = []
    states = []
    for index in range(STEPS):
        state, row = step(state, {}, device_batch(program, model, index))
        metrics.append({name: float(value) for name, value in row.items()})
        if index in (0, STEPS - 1):
            states.append(on_host(state))
    return Run(metrics, *states)


def first_step(
    model: ModelConfig, mesh: MeshConfig, devices: Sequence[jax.Device] | None = None, **options
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """The metrics of the first step, and its gradients as they were clipped, which are SGD's
    momentum after it.
    """
    program = build(model, mesh, devices, **options)
    state, metrics = program.compile_train_step()(
        begin(program.state, model), {}, device_batch(program, model, 0)
    )
    gradients = on_host(state.opt_state[0][0].trace)
    return {name: float(value) for name, value in metrics.items()}, gradients


def device_batch(program: Program, model: ModelConfig, index: int) -> Any:
    """A batch, of which each process places the rows of its own devices."""
    batch = host_batch(model, index)
    part, parts = process_rows(program.batch["tokens"].sharding, ROWS)
    mine = slice(part * ROWS // parts, (part + 1) * ROWS // parts)
    return shard_batch({name: batch[name][mine] for name in program.batch}, program.batch)


def on_host(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a tree by name, gathered where other processes hold parts of them."""
    leaves = jax.tree.leaves(tree)
    if not all(leaf.is_fully_addressable for leaf in leaves):
        whole = NamedSharding(leaves[0].sharding.mesh, PartitionSpec())
        tree = jax.jit(lambda tree: tree, out_shardings=whole)(tree)
    return {name: np.array(leaf) for name, leaf in named_leaves(tree).items()}


def assert_equal_runs(found: Run, expected: Run, model: ModelConfig) -> None:
    """Both runs have the same metrics in every step, losses and the clipping norm among them. After
    the first step, whose gradients are in the optimizer's state, and after the last one they have
    the same state.
    """
    for index, (row, other) in enumerate(zip(found.metrics, expected.metrics, strict=True)):
        assert row.keys() == other.keys()
        for name, value in row.items():
            is_later_norm = name == "grad_norm" and index > 0
            tolerance = LATER_NORM_TOLERANCE if is_later_norm else TOLERANCE
            is_equal = value == pytest.approx(other[name], abs=tolerance, rel=tolerance)
            assert is_equal, f"{name} = {value}, not {other[name]}, in step {index}"
    for state, other in ((found.first, expected.first), (found.last, expected.last)):
        assert state.keys() == other.keys()
        for name, array in state.items():
            atol = rtol = TOLERANCE
            if jax.config.jax_enable_x64:
                atol = TOLERANCE * np.abs(other[name]).max()
            np.testing.assert_allclose(array, other[name], rtol, atol, err_msg=name)

    # The control: the steps have moved every parameter that they train by far more than the
    # tolerance.
    for name, initial in named_leaves(random_params(model)).items():
        is_trained = not name.startswith("pooler/") and "type_embed" not in name
        moved = np.abs(expected.last[f"params/{name}"] - initial).max()
        assert not is_trained or moved > 50 * TOLERANCE, f"{name} is moved by {moved}"

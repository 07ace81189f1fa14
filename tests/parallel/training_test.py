"""A mesh changes where arrays lie, and no value: five AdamW steps on eight devices and on one."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from research.core.trees import named_leaves
from research.models.config import AttentionConfig, ModelConfig
from research.optim.optimizers import OptimConfig
from research.optim.schedules import ScheduleConfig
from research.parallel.mesh_config import MeshConfig
from research.parallel.process_parts import process_rows
from research.training.config import TrainConfig
from research.training.language_model import language_model_program
from research.training.state import TrainState
from research.training.step import shard_batch
from tests.tiny import random_batch, random_params, tiny_config

STEPS, ROWS, LENGTH = 5, 16, 8
MODEL = dataclasses.replace(
    tiny_config(num_layers=1, dropout=0.1), attention=AttentionConfig(8, 8, 2)
)


def host_batch(index: int) -> dict[str, np.ndarray]:
    """A batch whose rows weigh differently and end in padding."""
    batch = random_batch(ROWS, LENGTH, seed=index)
    real = np.arange(LENGTH) < 4 + np.arange(ROWS)[:, None] % 5
    batch["weights"] = np.where(real, 0.5 + np.arange(ROWS)[:, None] / ROWS, 0).astype(np.float32)
    batch["segments"] = real.astype(np.int32)
    return batch


def begin(shapes: TrainState, model: ModelConfig) -> TrainState:
    """The state of step 0, where AdamW's moments are zero, without a compilation."""
    state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    state = state.replace(params=random_params(model))

    # `device_put` would compare the values of all processes, array by array.
    def place(array: np.ndarray, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.make_array_from_callback(like.shape, like.sharding, lambda index: array[index])

    return jax.tree.map(place, state, shapes)


def train(
    mesh: MeshConfig,
    devices: Sequence[jax.Device] | None = None,
    model: ModelConfig = MODEL,
    accumulation: int = 1,
) -> tuple[list[dict[str, float]], Any]:
    """The metrics of each step, and the last state."""
    optim = OptimConfig(learning_rate=3e-3, epsilon=1e-6, schedule=ScheduleConfig(name="constant"))
    config = TrainConfig(
        steps=STEPS, batch_size=ROWS, sequence_length=LENGTH, accumulation=accumulation, z_loss=1e-4
    )
    program = language_model_program(model, optim, config, mesh, devices)
    step, state, rows = program.compile_train_step(), begin(program.state, model), []
    part, parts = process_rows(program.batch["tokens"].sharding, ROWS)
    mine = slice(part * ROWS // parts, (part + 1) * ROWS // parts)
    for index in range(STEPS):
        batch = {name: array[mine] for name, array in host_batch(index).items()}
        state, metrics = step(state, {}, shard_batch(batch, program.batch))
        rows.append({name: float(value) for name, value in metrics.items()})
    return rows, state


@functools.lru_cache
def alone() -> tuple[list[dict[str, float]], Any]:
    """The run on one device."""
    return train(MeshConfig(), jax.devices()[:1])


def assert_same_run(
    found: tuple[list[dict[str, float]], Any], expected: tuple[list[dict[str, float]], Any]
) -> None:
    for row, other in zip(found[0], expected[0], strict=True):
        assert row == pytest.approx(other, abs=1e-5, rel=1e-5)
    params, others = named_leaves(found[1].params), named_leaves(expected[1].params)
    assert set(params) == set(others)
    for name, array in params.items():
        np.testing.assert_allclose(
            np.asarray(array), np.asarray(others[name]), atol=1e-5, err_msg=name
        )


@pytest.mark.fast_cases("2x2x2")
@pytest.mark.parametrize(
    "sizes",
    [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)],
    ids=lambda sizes: "x".join(map(str, sizes)),
)
def test_mesh_gives_the_run_of_one_device(sizes: tuple[int, int, int]):
    data, fsdp, tensor = sizes
    found = train(MeshConfig(data=data, fsdp=fsdp, tensor=tensor))
    assert_same_run(found, alone())
    kernel = found[1].params["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (16 // fsdp, 24 // tensor)
    # The control: the steps have moved every parameter by far more than the tolerance.
    moved = jax.tree.map(
        lambda new, old: np.abs(np.asarray(new) - old).max(), found[1].params, random_params(MODEL)
    )
    assert min(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.thorough
@pytest.mark.default_passes
def test_scanned_layers_and_accumulation_give_the_same_run_on_a_mesh_as_on_one_device():
    options = {
        "model": dataclasses.replace(MODEL, num_layers=2, layer_loop="scan"),
        "accumulation": 2,
    }
    found = train(MeshConfig(data=2, fsdp=2, tensor=2), **options)
    assert_same_run(found, train(MeshConfig(), jax.devices()[:1], **options))


def test_run_without_dropout_is_another():
    without = train(MeshConfig(), jax.devices()[:1], dataclasses.replace(MODEL, dropout=0.0))
    assert abs(without[0][0]["loss"] - alone()[0][0]["loss"]) > 1e-3

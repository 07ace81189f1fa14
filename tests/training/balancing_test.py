"""Experts are kept evenly loaded by biases that move at a fixed speed, outside of the optimizer's
own work.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.trees import named_leaves
from research.models.config import ExpertsConfig, ModelConfig
from research.models.transformer import Transformer
from research.optim.optimizers import OptimConfig
from research.optim.schedules import ScheduleConfig
from research.parallel.mesh_config import MeshConfig
from research.training.config import TrainConfig
from research.training.language_model import LanguageModelLoss, language_model_program
from research.training.partition import TrainableConfig
from research.training.step import shard_batch
from tests.parallel.training_test import LENGTH, ROWS, begin, host_batch
from tests.tiny import tiny_config

SPEED, STEPS = 0.02, 40
EXPERTS = ExpertsConfig(
    num_experts=8, experts_per_token=2, hidden_dim=8, score="sigmoid", selection_bias=True
)
MODEL = tiny_config(num_layers=1, experts=dataclasses.replace(EXPERTS, bias_speed=SPEED))
CONTROL = tiny_config(num_layers=1, experts=EXPERTS)

Run = tuple[list[dict[str, np.ndarray]], list[dict[str, float]]]


def run(
    model: ModelConfig, steps: int, sizes: tuple[int, int, int] = (1, 1, 1), accumulation: int = 1
) -> Run:
    """The parameters before each step and after the last, and the metrics of each; all batches are
    two in turns.
    """
    optim = OptimConfig(
        learning_rate=1e-3, epsilon=1e-4, schedule=ScheduleConfig(name="constant"), clip_norm=0.5
    )
    config = TrainConfig(
        steps=STEPS, batch_size=ROWS, sequence_length=LENGTH, accumulation=accumulation
    )
    mesh = MeshConfig(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])
    program = language_model_program(model, optim, config, mesh, jax.devices()[: math.prod(sizes)])
    step, state, metrics = program.compile_train_step(), begin(program.state, model), []
    params = [host(state.params)]
    for index in range(steps):
        state, row = step(state, {}, shard_batch(host_batch(index % 2), program.batch))
        metrics.append({name: float(value) for name, value in row.items()})
        params.append(host(state.params))
    return params, metrics


def host(params: Any) -> dict[str, np.ndarray]:
    """Parameters by the names of an unrolled model of one layer."""
    scanned = {name: np.array(value) for name, value in named_leaves(params).items()}
    return {
        name.replace("layers/", "layers_0/"): value[0] if name.startswith("layers/") else value
        for name, value in scanned.items()
    }


@functools.cache
def alone() -> Run:
    return run(MODEL, STEPS)


@functools.cache
def control() -> Run:
    return run(CONTROL, STEPS)


@functools.cache
def scores() -> Any:
    """Returns a function of parameters and a batch: what the router scores each token with."""

    @jax.jit
    def call(params: Any, batch: Any) -> jax.Array:
        inputs = {name: batch[name] for name in ("tokens", "positions", "segments")}
        options = {"capture_intermediates": lambda module, _: module.name == "router"}
        _, seen = Transformer(CONTROL).apply({"params": params}, inputs, **options)
        return jax.nn.sigmoid(seen["intermediates"]["layers_0"]["mlp"]["router"]["__call__"][0])

    return call


def loads(params: dict[str, np.ndarray], index: int) -> np.ndarray:
    """Counts, token by token, how many real ones go to each expert."""
    batch, tree = host_batch(index % 2), {}
    for name, value in params.items():
        *groups, last = name.split("/")
        functools.reduce(lambda place, group: place.setdefault(group, {}), groups, tree)[last] = (
            jnp.asarray(value)
        )
    scored, load = np.asarray(scores()(tree, batch)), np.zeros(EXPERTS.num_experts)
    for row, column in np.argwhere(batch["segments"] != 0):
        ranked = scored[row, column] + bias(params)
        for expert in sorted(range(len(load)), key=lambda expert: -ranked[expert])[
            : EXPERTS.experts_per_token
        ]:
            load[expert] += 1
    return load


def bias(params: dict[str, np.ndarray]) -> np.ndarray:
    return params["layers_0/mlp/selection_bias"]


def test_bias_moves_as_a_plain_loop_says():
    params, _ = alone()
    assert (host_batch(0)["segments"] == 0).any()  # padding, which counts nothing
    for index in (0, 1, 2, STEPS - 1):
        load = loads(params[index], index)
        expected = bias(params[index]) + SPEED * np.sign(load.mean() - load)
        np.testing.assert_allclose(bias(params[index + 1]), expected, atol=1e-6)


def test_load_becomes_even_by_the_bias_alone():
    def unevenness(params: Any, index: int) -> float:
        load = loads(params, index)
        return float(load.max() / load.mean() - 1)

    (params, _), (others, _) = alone(), control()
    assert unevenness(params[0], 0) > 1
    assert unevenness(params[-1], 0) < 0.5
    assert unevenness(others[-1], 0) > 1


def test_nothing_else_is_touched():
    """Neither the norm, the clipping nor the moments of the others see the load; no decay sees the
    bias.
    """
    (params, metrics), (others, expected) = alone(), control()
    assert metrics[0] == expected[0]
    assert metrics[0]["grad_norm"] > 0.5  # so that it is clipped
    assert np.abs(bias(params[1]) - bias(others[1])).max() == pytest.approx(SPEED, rel=1e-4)
    np.testing.assert_array_equal(bias(others[-1]), bias(others[0]))
    for name in params[1]:
        if "selection_bias" not in name:
            np.testing.assert_array_equal(params[1][name], others[1][name], err_msg=name)


@pytest.mark.thorough
def test_two_devices_microbatches_and_a_loop_move_it_alike():
    """Eight devices: `tests/parallel/structures_test.py`."""
    params, _ = run(dataclasses.replace(MODEL, layer_loop="scan"), 3, (2, 1, 1), accumulation=2)
    for found, expected in zip(params, alone()[0], strict=False):
        np.testing.assert_array_equal(bias(found), bias(expected))


@pytest.mark.thorough
@pytest.mark.parametrize("count", [1, 2])
def test_biases_of_the_last_layers_of_a_scanned_stack_follow_the_load_of_their_own_layers(
    count: int,
):
    model = dataclasses.replace(MODEL, num_layers=3, layer_loop="scan")
    options = {"batch_size": ROWS, "sequence_length": LENGTH}
    config = TrainConfig(
        steps=STEPS, trainable=TrainableConfig("last_layers", num_layers=count), **options
    )
    program = language_model_program(model, OptimConfig(), config, MeshConfig(), jax.devices()[:1])
    state, frozen = program.resume_or_create(None, jax.random.key(0))
    first = program.merge(state, frozen).params
    batch = shard_batch(host_batch(0), program.batch)
    _, report = jax.jit(LanguageModelLoss(model).sums)(first, {}, batch, None)
    load = np.asarray(report.experts["layers/mlp"].load)

    state, _ = program.compile_train_step()(state, frozen, batch)

    # [3 layers, 8 experts], of which the last `count` layers are trained
    expected = SPEED * np.sign(load.mean(axis=-1, keepdims=True) - load)
    assert len({tuple(row) for row in expected}) == 3
    expected[:-count] = 0
    moved = program.merge(state, frozen).params["layers"]["mlp"]["selection_bias"]
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def test_state_is_that_of_a_run_without_it():
    """So a run may go on with another speed, as DeepSeek-V3's did."""
    options = (
        OptimConfig(),
        TrainConfig(steps=9, batch_size=ROWS, sequence_length=LENGTH),
        MeshConfig(),
    )
    states = [
        language_model_program(model, *options, jax.devices()[:1]).state
        for model in (MODEL, CONTROL)
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])

"""Of every parameter of every preset the optimizer knows what it is: matrices decay, biases and
scales do not.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.trees import named_leaves
from research.optim.optimizers import OptimConfig, build_optimizer
from research.optim.schedules import ScheduleConfig
from research.parallel.parameter import Axes, logical_axes
from tests.configs.model_test import FILES, preset, sizes
from tests.tiny import abstract_params

# What the last part of a parameter's name stands for. The table that T5 looks up its biases of
# distance in is one too.
KINDS = {
    **dict.fromkeys(("kernel",), "kernel"),
    **dict.fromkeys(("embedding", "unembed"), "table"),
    **dict.fromkeys(
        ("bias", "logit_bias", "sinks", "content", "distance", "position_bias"), "bias"
    ),
    "scale": "scale",
    "selection_bias": "selection",
}


# Those with arrays that are no plain matrix, bias or scale stand for all in the fast tier.
ALL = [
    pytest.param(file, marks=() if file in ("deepseek", "gpt_oss", "t5") else pytest.mark.thorough)
    for file in FILES
]


@functools.cache
def axes_of(file: str) -> dict[str, Axes]:
    """The axes of the parameters of a preset, by name; scanned layers are traced once, however many
    there are.
    """
    config = preset(file, sizes(file)[0])
    attention = dataclasses.replace(config.attention, implementation="reference")
    return named_leaves(
        logical_axes(
            abstract_params(dataclasses.replace(config, layer_loop="scan", attention=attention))
        )
    )


def kind_of(name: str) -> str:
    parts = name.split("/")
    return "bias" if "position_bias" in parts else KINDS[parts[-1]]


def moved(name: str, axes: dict[str, Axes]) -> dict[str, float]:
    """How far one step at zero gradient, rate 0.1 and decay 0.1 moves arrays of ones."""
    params = {each: np.ones((2,) * len(of.names), np.float32) for each, of in axes.items()}
    config = OptimConfig(
        name=name, learning_rate=0.1, weight_decay=0.1, schedule=ScheduleConfig(name="constant")
    )
    optimizer, _ = build_optimizer(config, axes, 10)

    @jax.jit
    def update(params: Any) -> Any:
        return optimizer.update(
            jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params
        )[0]

    return {each: float(np.abs(leaf).max()) for each, leaf in update(params).items()}


@pytest.mark.parametrize("file", ALL)
def test_matrices_decay_and_nothing_else_moves_at_zero_gradient(file: str):
    axes = axes_of(file)
    assert {each: of.kind for each, of in axes.items()} == {each: kind_of(each) for each in axes}
    for each, distance in moved("adamw", axes).items():
        decays = kind_of(each) in ("kernel", "table")
        assert distance == pytest.approx(0.01 if decays else 0.0, rel=1e-5, abs=0), each


@pytest.mark.parametrize("file", ALL)
def test_every_kernel_has_inputs_and_outputs(file: str):
    for name, of in axes_of(file).items():
        inputs, outputs = of.inputs_and_outputs()
        if of.kind == "kernel":
            assert inputs, name
            assert outputs, name
            stacked = sum(axis in ("layers", "expert") for axis in of.names)
            assert len(inputs) + len(outputs) + stacked == len(of.names), name


@pytest.mark.parametrize(
    ("file", "name", "decays"),
    [
        ("gpt_oss", "layers/mlp/experts/down/bias", False),
        ("gpt_oss", "layers/mlp/experts/down/kernel", True),
        ("deepseek", "layers/attention/query/kernel", True),
        ("deepseek", "layers/attention/key/kernel", True),
        ("deepseek", "layers/attention/value/kernel", True),
    ],
)
def test_muon_tells_the_biases_of_experts_from_projections_of_latents(
    file: str, name: str, decays: bool
):
    axes = {name: axes_of(file)[name]}
    assert moved("muon", axes)[name] == pytest.approx(0.01 if decays else 0.0, rel=1e-5, abs=0)

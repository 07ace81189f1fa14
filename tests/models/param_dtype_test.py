"""The type of parameters is a value of the config."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.trees import named_leaves
from research.models.config import ModelConfig
from research.models.initialization import init_params
from research.optim.optimizers import OptimConfig
from research.optim.schedules import ScheduleConfig
from research.parallel.mesh_config import MeshConfig
from research.training.config import TrainConfig
from research.training.language_model import language_model_program
from research.training.step import shard_batch
from tests.models.layer_loops_test import LENGTHS
from tests.models.variants import VARIANTS, rows, unpacked
from tests.models.variants_test import logits
from tests.tiny import abstract_params, random_batch, tiny_config


def in_bfloat16(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, param_dtype="bfloat16")


@pytest.mark.fast_cases(
    "windows", "sinks", "shared experts", "latent", "encoder-decoder", "encoder"
)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_has_the_type_of_the_config(name: str):
    shapes = named_leaves(nn.unbox(abstract_params(in_bfloat16(VARIANTS[name]))))
    others = {leaf for leaf, shape in shapes.items() if shape.dtype != jnp.bfloat16}
    # A selection bias moves by steps that bfloat16 would swallow.
    assert others == {leaf for leaf in shapes if leaf.endswith("selection_bias")}


@pytest.mark.fast_cases("sinks", "relative")
@pytest.mark.parametrize("name", ["sinks", "relative", "clamped experts", "encoder"])
def test_parameters_in_bfloat16_are_read_as_the_numbers_that_they_are(name: str):
    config = in_bfloat16(VARIANTS[name])
    params = nn.unbox(jax.jit(lambda: init_params(config, jax.random.key(0)))())
    inputs = unpacked(rows(config, LENGTHS))
    same = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
    found, expected = logits(config, params, inputs), logits(VARIANTS[name], same, inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_a_step_keeps_their_type_and_undoes_what_is_not_finite():
    model = in_bfloat16(tiny_config(num_layers=1))
    optim = OptimConfig(learning_rate=0.02, schedule=ScheduleConfig(name="constant"))
    train = TrainConfig(steps=9, batch_size=4, sequence_length=8)
    program = language_model_program(model, optim, train, MeshConfig(), jax.devices()[:1])
    step = program.compile_train_step()
    state = program.create(jax.random.key(0))
    batch = shard_batch(random_batch(4, 8), program.batch)

    def bits(state: Any) -> dict[str, np.ndarray]:
        return {
            name: np.array(leaf)
            for name, leaf in named_leaves((state.params, state.opt_state)).items()
        }

    losses = []
    for _ in range(6):
        state, metrics = step(state, {}, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.3
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("bfloat16")}
    assert {leaf.sharding for leaf in jax.tree.leaves(state.params)} <= {
        leaf.sharding for leaf in jax.tree.leaves(program.state.params)
    }
    before = bits(state)
    weights = jax.device_put(np.full((4, 8), np.inf, np.float32), program.batch["weights"].sharding)
    state, metrics = step(state, {}, {**batch, "weights": weights})
    assert float(metrics["skipped"]) == 1
    for name, leaf in bits(state).items():
        np.testing.assert_array_equal(leaf, before[name], err_msg=name)

"""A mesh changes where arrays lie, and no value, whatever the model is: steps on eight devices and
on one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from research.core.trees import named_leaves
from research.data.objectives import ObjectiveConfig
from research.models.config import ModelConfig
from research.optim.optimizers import OptimConfig
from research.optim.schedules import ScheduleConfig
from research.parallel.mesh import MeshConfig
from research.training.config import TrainConfig
from research.training.language_model import language_model_program
from research.training.step import shard_batch
from tests.models.variants import VARIANTS, pack, rows
from tests.parallel.training_test import begin
from tests.tiny import random_params, random_tokens

STEPS, ROWS, LENGTH = 2, 8, 16
# Relative, and absolute below 1. In float64 both runs of the encoder-decoder agree to 8e-15 in
# every number of both steps, so that what differs in float32 is rounding: 3e-6 in its first
# gradient.
TOLERANCE = 1e-5
# The second gradient is taken at parameters that differ already. Where AdamW's epsilon is large
# beside a gradient, the update is learning_rate / epsilon = 30 times as far off as the gradient,
# some 6e-6. Noise of 2e-6 on every parameter, a fifth of what is allowed, moves the second norm by
# 1e-4 (encoder-decoder, shared experts) and the loss by 3e-6.
SECOND_NORM_TOLERANCE = 1e-4
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


def train(
    model: ModelConfig, mesh: MeshConfig, devices: Sequence[jax.Device] | None = None
) -> tuple[list[dict[str, float]], Any]:
    """The metrics of each step, and the last parameters."""
    optim = OptimConfig(learning_rate=3e-3, epsilon=1e-4, schedule=ScheduleConfig(name="constant"))
    config = TrainConfig(steps=STEPS, batch_size=ROWS, sequence_length=LENGTH)
    program = language_model_program(
        model, optim, config, mesh, devices, ObjectiveConfig(kind=OBJECTIVES[model.structure])
    )
    step, state, metrics = program.compile_train_step(), begin(program.state, model), []
    for index in range(STEPS):
        batch = host_batch(model, index)
        state, row = step(
            state, {}, shard_batch({name: batch[name] for name in program.batch}, program.batch)
        )
        metrics.append({name: float(value) for name, value in row.items()})
    return metrics, state.params


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name",
    [
        "experts",
        "clamped experts",
        "shared experts",
        "latent",
        "buckets",
        "encoder",
        "encoder-decoder",
    ],
)
def test_a_mesh_gives_the_run_of_one_device(name: str):
    model = dataclasses.replace(VARIANTS[name], dropout=0.1)
    metrics, params = train(model, MeshConfig(data=2, fsdp=2, tensor=2))
    expected_metrics, expected = train(model, MeshConfig(), jax.devices()[:1])
    norms, expected_norms = (
        [row.pop("grad_norm") for row in rows] for rows in (metrics, expected_metrics)
    )
    for row, other in zip(metrics, expected_metrics, strict=True):
        assert row == pytest.approx(other, abs=TOLERANCE, rel=TOLERANCE)
    assert norms[0] == pytest.approx(expected_norms[0], rel=TOLERANCE)
    assert norms[1] == pytest.approx(expected_norms[1], rel=SECOND_NORM_TOLERANCE)
    initial = named_leaves(random_params(model))
    for leaf, array in named_leaves(params).items():
        other = np.asarray(named_leaves(expected)[leaf])
        np.testing.assert_allclose(np.asarray(array), other, atol=1e-5, err_msg=leaf)
        # The control: the steps have moved every parameter that they train by far more than the
        # tolerance.
        trained = not leaf.startswith("pooler/") and "type_embed" not in leaf
        assert not trained or np.abs(other - initial[leaf]).max() > 1e-3, leaf

"""Runs of small models on meshes, to be compared with the run of one device."""

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
from research.parallel.mesh_config import MeshConfig
from research.training.config import PipelineConfig, TrainConfig
from research.training.language_model import language_model_program
from research.training.program import Program
from research.training.step import shard_batch
from tests.models.variants import pack, rows
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


ONE_F_ONE_B = PipelineConfig()


def build(
    model: ModelConfig,
    mesh: MeshConfig,
    devices: Sequence[jax.Device] | None = None,
    accumulation: int = 1,
    pipeline: PipelineConfig = ONE_F_ONE_B,
) -> Program:
    """The programs of a run of a few steps."""
    optim = OptimConfig(learning_rate=3e-3, epsilon=1e-4, schedule=ScheduleConfig(name="constant"))
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
) -> tuple[list[dict[str, float]], Any]:
    """The metrics of each step, and the last parameters; options as of `build`."""
    program = build(model, mesh, devices, **options)
    step = program.compile_train_step()
    state = begin(program.state, model)
    metrics = []
    for index in range(STEPS):
        batch = host_batch(model, index)
        state, row = step(
            state, {}, shard_batch({name: batch[name] for name in program.batch}, program.batch)
        )
        metrics.append({name: float(value) for name, value in row.items()})
    return metrics, state.params


def assert_equal_runs(
    found: tuple[list[dict[str, float]], Any],
    expected: tuple[list[dict[str, float]], Any],
    model: ModelConfig,
) -> None:
    """Both runs have the same metrics and end with the same parameters."""
    metrics, params = found
    expected_metrics, expected_params = expected
    norms = [row.pop("grad_norm") for row in metrics]
    expected_norms = [row["grad_norm"] for row in expected_metrics]
    for row, other in zip(metrics, expected_metrics, strict=True):
        wanted = {name: value for name, value in other.items() if name != "grad_norm"}
        assert row == pytest.approx(wanted, abs=TOLERANCE, rel=TOLERANCE)
    assert norms[0] == pytest.approx(expected_norms[0], rel=TOLERANCE)
    assert norms[1] == pytest.approx(expected_norms[1], rel=SECOND_NORM_TOLERANCE)

    initial = named_leaves(random_params(model))
    others = named_leaves(expected_params)
    for leaf, array in named_leaves(params).items():
        other = np.asarray(others[leaf])
        np.testing.assert_allclose(np.asarray(array), other, atol=1e-5, err_msg=leaf)
        # The control: the steps have moved every parameter that they train by far more than the
        # tolerance.
        trained = not leaf.startswith("pooler/") and "type_embed" not in leaf
        assert not trained or np.abs(other - initial[leaf]).max() > 1e-3, leaf

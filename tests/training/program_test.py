"""What a run computes, put together from its configuration."""

import jax
import pytest

from research.optim.optimizers import OptimConfig
from research.optim.schedules import ScheduleConfig
from research.parallel.mesh_config import MeshConfig
from research.training.config import TrainConfig
from research.training.language_model import LanguageModelLoss, language_model_program
from tests.tiny import random_batch, random_params, summed, tiny_config


@pytest.mark.parametrize("option", [{"label_smoothing": 0.2}, {"z_loss": 0.1}])
def test_evaluation_is_plain_whatever_training_adds_to_its_loss(option):
    model, params, batch = tiny_config(), random_params(tiny_config()), random_batch(2, 8)
    optim = OptimConfig(schedule=ScheduleConfig(name="constant"))
    train = TrainConfig(steps=1, batch_size=2, sequence_length=8, **option)
    program = language_model_program(model, optim, train, MeshConfig(), jax.devices()[:1])
    plain, _ = jax.jit(summed(LanguageModelLoss(model)))(params, batch, None)
    sums = jax.jit(program.eval_step)(params, {}, batch)
    assert float(sums["loss"] + sums["z_loss"]) == pytest.approx(float(plain), rel=1e-6)
    # The control: in training the same tokens cost more.
    trained, _ = jax.jit(summed(LanguageModelLoss(model, train.z_loss, train.label_smoothing)))(
        params, batch, None
    )
    assert abs(float(trained) / float(plain) - 1) > 1e-3

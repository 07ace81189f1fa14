"""What a language model minimizes: cross-entropy and the terms beside it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.kernels.attention import KeyExchange
from research.models.config import ExpertsConfig, HeadConfig, LayerConfig, ModelConfig
from research.models.transformer import Transformer
from research.optim.optimizers import OptimConfig
from research.parallel.mesh_config import MeshConfig
from research.training.config import TrainConfig
from research.training.language_model import (
    LanguageModelLoss,
    language_model_program,
)
from research.training.mesh_checks import check_axes
from research.training.step import make_eval_step
from tests.tiny import logits, random_batch, random_params, summed, tiny_config


@functools.lru_cache
def language() -> tuple[Any, Any, dict[str, jax.Array], np.ndarray]:
    """A tiny model, a batch with weights and padding, and the log-probabilities of its logits."""
    config = tiny_config()
    params = random_params(config)
    batch = random_batch(2, 8)
    batch["weights"] = np.random.default_rng(0).uniform(0.5, 2, (2, 8)).astype(np.float32)
    batch["segments"][1, 5:] = 0
    batch["weights"][1, 5:] = 0
    batch = {name: jnp.asarray(array) for name, array in batch.items()}
    z = np.asarray(
        logits(config, params, batch["tokens"], batch["positions"], batch["segments"]), np.float64
    )
    return config, params, batch, z


def test_language_model_loss_is_weighted_cross_entropy_and_z_loss():
    config, params, batch, z = language()
    log_z = np.log(np.exp(z).sum(axis=-1))
    nll = log_z - np.take_along_axis(z, np.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    weights = np.asarray(batch["weights"], np.float64)
    total, sums = jax.jit(summed(LanguageModelLoss(config, 0.01)))(params, batch, None)
    assert float(sums["loss"]) == pytest.approx((weights * nll).sum(), rel=1e-5)
    assert float(sums["z_loss"]) == pytest.approx(0.01 * (weights * log_z**2).sum(), rel=1e-5)
    assert float(total) == pytest.approx(float(sums["loss"] + sums["z_loss"]), rel=1e-6)


def test_loss_of_further_tokens_is_reported_by_itself_and_weighed_in_the_total():
    config = tiny_config(num_layers=1, head=HeadConfig(mtp_depth=1, mtp_weight=0.3))
    params, batch = random_params(config), jax.tree.map(jnp.asarray, random_batch(2, 6))

    def apply(module: Transformer) -> jax.Array:
        hidden = module({name: batch[name] for name in ("tokens", "positions")}).hidden
        states, _ = module.mtp_hidden(
            hidden, [batch["targets"]], batch["positions"], batch["segments"]
        )
        return module.logits(states[0])

    log_p = jax.nn.log_softmax(
        jax.jit(lambda params: Transformer(config).apply({"params": params}, method=apply))(params)
    )
    # At each place but the last the token after the next one is predicted.
    wanted = -sum(log_p[row, t, batch["targets"][row, t + 1]] for row in range(2) for t in range(5))
    total, sums = jax.jit(summed(LanguageModelLoss(config)))(params, batch, None)
    assert float(sums["mtp_loss"]) == pytest.approx(float(wanted), rel=1e-5)
    assert float(total) == pytest.approx(float(sums["loss"] + 0.3 * sums["mtp_loss"]), rel=1e-6)


def test_further_tokens_are_predicted_inside_a_document_alone():
    config = tiny_config(num_layers=1, head=HeadConfig(mtp_depth=2))
    params, batch = random_params(config), random_batch(1, 8)
    loss = jax.jit(summed(LanguageModelLoss(config)))

    def mtp_loss(*documents: slice) -> float:
        """Of these parts of the row, packed into one in their places."""
        packed = dict(
            batch,
            segments=np.zeros_like(batch["segments"]),
            positions=np.zeros_like(batch["positions"]),
        )
        for number, part in enumerate(documents, 1):
            packed["segments"][:, part] = number
            packed["positions"][:, part] = np.arange(part.stop - part.start)
        packed["weights"] = (packed["segments"] != 0).astype(np.float32)
        return float(loss(params, jax.tree.map(jnp.asarray, packed), None)[1]["mtp_loss"])

    first, second = slice(0, 3), slice(3, 8)
    apart = mtp_loss(first) + mtp_loss(second)
    assert mtp_loss(first, second) == pytest.approx(apart, rel=1e-5)
    assert (
        abs(mtp_loss(slice(0, 8)) - apart) > 1
    )  # the control: one document of both has more to predict


def test_label_smoothing_mixes_the_loss_with_the_mean_of_the_vocabulary():
    config, params, batch, z = language()
    log_p = z - np.log(np.exp(z).sum(axis=-1, keepdims=True))
    wanted = np.take_along_axis(log_p, np.asarray(batch["targets"])[..., None], axis=-1)[..., 0]
    smooth = -(0.9 * wanted + 0.1 * log_p.mean(axis=-1))
    total, _ = jax.jit(summed(LanguageModelLoss(config, label_smoothing=0.1)))(params, batch, None)
    assert float(total) == pytest.approx((np.asarray(batch["weights"]) * smooth).sum(), rel=1e-5)


def test_evaluation_gives_sums_and_their_weight():
    config, params, batch, _ = language()
    step = jax.jit(make_eval_step(LanguageModelLoss(config, 0.01)))
    sums = step(params, {}, batch)
    _, expected = jax.jit(summed(LanguageModelLoss(config, 0.01)))(params, batch, None)
    assert float(sums["loss"]) == pytest.approx(float(expected["loss"]), rel=1e-6)
    assert float(sums["weight"]) == pytest.approx(float(batch["weights"].sum()), rel=1e-6)


def test_dropout_acts_in_training_and_not_in_evaluation():
    config, params, batch, _ = language()
    dropping = jax.jit(summed(LanguageModelLoss(tiny_config(dropout=0.5))))
    still, plain = (
        loss(params, batch, None)[0]
        for loss in (dropping, jax.jit(summed(LanguageModelLoss(config))))
    )
    assert float(still) == pytest.approx(float(plain), rel=1e-6)
    one, same, other = (
        float(dropping(params, batch, jax.random.key(seed))[0]) for seed in (0, 0, 1)
    )
    assert one == same
    assert abs(one - other) > 1e-2
    assert abs(one - float(still)) > 1e-2


EXPERTS = ExpertsConfig(num_experts=4, experts_per_token=2, hidden_dim=8)
SIZES = dict.fromkeys(("data", "fsdp", "pipeline", "context", "expert", "tensor"), 1)


@pytest.mark.parametrize(
    ("model", "axis", "size", "message"),
    [
        ({}, "expert", 2, "mesh.expert = 2: no layer of the model has experts. Use 1"),
        (
            {"experts": EXPERTS, "pattern": (LayerConfig(experts=False),)},
            "expert",
            2,
            "mesh.expert = 2: no layer of the model has experts.",
        ),
        (
            {"num_layers": 3},
            "pipeline",
            4,
            "mesh.pipeline × train.pipeline.chunks = 4 is more than the 3 layers of the model:",
        ),
        (
            {"num_layers": 4, "structure": "encoder_decoder", "encoder_layers": 2},
            "pipeline",
            4,
            "mesh.pipeline × train.pipeline.chunks = 4 is more than the 2 layers of the encoder:",
        ),
    ],
)
def test_an_axis_that_a_model_cannot_use_is_refused(model, axis, size, message):
    with pytest.raises(UserError) as caught:
        check_axes(tiny_config(**model), {**SIZES, axis: size})
    assert str(caught.value).startswith(message)


def test_groups_that_exchange_heads_must_divide_devices_and_heads():
    def model(all_to_all: int) -> ModelConfig:
        return tiny_config(attention={"exchange": KeyExchange(all_to_all=all_to_all)})

    # 4 query heads, of which a device has 2
    sizes = {**SIZES, "context": 4, "tensor": 2}
    check_axes(model(2), sizes)
    with pytest.raises(UserError, match=r"all_to_all = 4 does not divide the query heads of a dev"):
        check_axes(model(4), sizes)
    with pytest.raises(UserError, match=r"all_to_all = 3 does not divide mesh.context = 4. Use 2"):
        check_axes(model(3), sizes)
    # Without a context axis nothing is exchanged.
    check_axes(model(3), SIZES)


def test_axes_that_a_model_can_use_are_taken():
    check_axes(tiny_config(experts=EXPERTS), {**SIZES, "expert": 4})
    check_axes(tiny_config(num_layers=4), {**SIZES, "pipeline": 4})
    check_axes(tiny_config(num_layers=5), {**SIZES, "pipeline": 4})
    check_axes(tiny_config(), {**SIZES, "data": 4, "fsdp": 2, "context": 2, "tensor": 2})


def test_training_refuses_such_an_axis_before_anything_is_compiled():
    with pytest.raises(UserError, match=r"mesh.expert = 8: no layer of the model has experts"):
        language_model_program(
            tiny_config(), OptimConfig(), TrainConfig(steps=1), MeshConfig(expert=8)
        )

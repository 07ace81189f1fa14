"""The golden case of multi-token prediction: DeepSeek-V3 with two such layers, so that the second
reads what the first returns.
"""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from research.interop.architecture import config_from
from research.interop.deepseek import DEEPSEEK_V3
from research.interop.mapping import params_from
from research.models.config import ModelConfig
from research.models.transformer import Transformer
from research.training.language_model import LanguageModelLoss
from tests.interop import cases
from tests.tiny import summed

DEPTH, WEIGHT = 2, 0.3
# TensorSpec of a predictor -> the tensor that it copies.
COPIES = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "shared_head.head.weight": "lm_head.weight",
}

Tensors = dict[str, np.ndarray]


def weights(shapes: dict[str, list[int]]) -> Tensors:
    """Returns the seed's weights, copies as what they copy."""
    tensors = cases.weights(shapes)
    for name in tensors:
        original = original_of(name)
        if original is not None:
            tensors[name] = tensors[original]
    return tensors


def original_of(name: str) -> str | None:
    """Returns the tensor that a tensor copies, or None."""
    return next(
        (original for copy, original in COPIES.items() if name.endswith(copy) and name != original),
        None,
    )


def without_copies(tensors: Tensors) -> Tensors:
    """Returns the tensors that copy none."""
    return {name: value for name, value in tensors.items() if original_of(name) is None}


@functools.cache
def stored() -> dict[str, Any]:
    """Returns the `config` and the `tensors` (shapes by name) of the folder."""
    return json.loads((cases.GOLDENS / "mtp.json").read_text())


@functools.cache
def model() -> tuple[ModelConfig, Any, Tensors]:
    """Returns the config, the parameters and the tensors."""
    config, tensors = config_from(DEEPSEEK_V3, stored()["config"]), weights(stored()["tensors"])
    return config, params_from(DEEPSEEK_V3, config, tensors), tensors


@functools.cache
def golden() -> Tensors:
    """Returns what torch computed: logits as `depth_1`, …, and the `gradients`' facts."""
    with np.load(cases.GOLDENS / "mtp.npz") as arrays:
        return dict(arrays)


def batch() -> dict[str, jax.Array]:
    """Returns the batch of training whose rows are the golden tokens."""
    tokens = jnp.asarray(cases.tokens())
    given = tokens[:, :-1]
    return {
        "tokens": given,
        "targets": tokens[:, 1:],
        "weights": jnp.ones(given.shape),
        "positions": jnp.broadcast_to(jnp.arange(given.shape[1], dtype=jnp.int32), given.shape),
        "segments": jnp.ones_like(given),
    }


def logits(config: ModelConfig, params: Any) -> list[np.ndarray]:
    """Returns the logits of each depth, at the places that have so many tokens after them."""
    given = batch()
    following = [jnp.pad(given["targets"], ((0, 0), (0, k)))[:, k:] for k in range(DEPTH)]

    def apply(module: Transformer) -> list[jax.Array]:
        hidden = module({"tokens": given["tokens"], "positions": given["positions"]}).hidden
        states, _ = module.mtp_hidden(hidden, following, given["positions"], None)
        return [module.logits(state) for state in states]

    found = jax.jit(lambda params: Transformer(config).apply({"params": params}, method=apply))(
        params
    )
    return [np.asarray(each)[:, :-depth] for depth, each in enumerate(found, 1)]


@functools.cache
def gradients() -> Any:
    """Returns the gradient of the loss that training takes, a token."""
    config, params, _ = model()
    given, loss = batch(), summed(LanguageModelLoss(config))
    return jax.jit(jax.grad(lambda params: loss(params, given, None)[0] / given["weights"].sum()))(
        params
    )

"""A model small enough to compile in a blink, and batches for it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import tree_map_with_path

from research.core.trees import path_name
from research.models.config import AttentionConfig, MlpConfig, ModelConfig
from research.models.initialization import init_params
from research.models.transformer import Transformer
from research.training.gradients import Loss

VOCAB = 48


def tiny_config(
    attention: dict[str, Any] | None = None, mlp: dict[str, Any] | None = None, **changes
) -> ModelConfig:
    """A two-layer decoder; `attention`, `mlp` and further fields replace its values."""
    config = ModelConfig(
        vocab_size=VOCAB,
        num_layers=2,
        embed_dim=16,
        max_length=64,
        attention=AttentionConfig(
            **({"num_heads": 4, "num_kv_heads": 2, "head_dim": 4} | (attention or {}))
        ),
        mlp=dataclasses.replace(MlpConfig(hidden_dim=24), **(mlp or {})),
        init_stddev=0.3,
    )
    return dataclasses.replace(config, **changes)


def abstract_params(config: ModelConfig) -> Any:
    """Shapes of a model's parameters, boxed with their axes."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def random_params(config: ModelConfig, seed: int = 0) -> Any:
    """Parameters with no zero bias and no scale of one, so that each of them tells in the
    logits.
    """
    rng = np.random.default_rng(seed)

    def fill(path: Any, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        mean = 1.0 if path_name(path).endswith("scale") else 0.0
        return rng.normal(mean, 0.3, leaf.shape).astype(np.float32)

    return tree_map_with_path(fill, nn.unbox(abstract_params(config)))


def random_tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (rows, length), dtype=np.int32)


def random_batch(rows: int, length: int, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of whole rows, every token weighing one."""
    tokens = random_tokens(rows, length + 1, seed)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": np.ones((rows, length), np.float32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "segments": np.ones((rows, length), np.int32),
    }


@functools.partial(jax.jit, static_argnums=0)
def logits(
    config: ModelConfig, params: Any, tokens: Any, positions: Any = None, segments: Any = None
) -> jax.Array:
    """Float32 logits `[B, T, V]`; positions count from 0 and rows are whole where nothing else is
    said.
    """
    positions = (
        jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        if positions is None
        else positions
    )

    def apply(module: Transformer) -> jax.Array:
        whole = {} if segments is None else {"segments": segments}
        return module.logits(module({"tokens": tokens, "positions": positions, **whole}).hidden)

    return Transformer(config).apply({"params": params}, method=apply)


def summed(loss: Loss) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """Returns `f(params, batch, key)`: all that training minimizes, as one sum, and the reported
    sums.
    """

    def call(params: Any, batch: Any, key: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        total, report = loss.sums(params, {}, batch, key)
        return total + loss.weight(batch) * sum(report.means.values()), report.sums

    return call


def stack(params: Any, num_layers: int) -> Any:
    """Unrolled parameters in the form that a scanned model holds them."""
    layers = [params[f"layers_{i}"] for i in range(num_layers)]
    rest = {name: value for name, value in params.items() if not name.startswith("layers_")}
    return {**rest, "layers": jax.tree.map(lambda *leaves: np.stack(leaves), *layers)}

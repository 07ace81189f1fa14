"""Logits of whole sequences, for whoever reads a model from Python."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from research.core.errors import UserError
from research.models.config import ModelConfig
from research.models.transformer import Transformer


def rows_of(
    config: ModelConfig, name: str, tokens: ArrayLike, segments: ArrayLike | None
) -> dict[str, Int[Array, "B T"]]:
    """Returns tokens and their positions, and segments where there are any.

    Args:
      config: of the model that is to read them.
      name: of the tokens, for messages.
      tokens: rows of ids.
      segments: of packed rows, 0 for padding; positions start anew in each. None: a row is one sequence.

    Raises:
      UserError: not rows of ids, an id out of range, or rows longer than the model's positions.
    """
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2:
        raise UserError(f"{name}: shape {tokens.shape} must be [rows, ids]: one row is [[1, 2, 3]].")
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < config.vocab_size:
        bad = tokens.min() if tokens.min() < 0 else tokens.max()
        raise UserError(f"{name}: id {bad} is out of range: it must lie in [0, {config.vocab_size}).")
    if tokens.shape[1] > config.max_length:
        raise UserError(f"{name}: {tokens.shape[1]} is longer than model.max_length = {config.max_length}.")
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    if segments is None:
        return {"tokens": jnp.asarray(tokens), "positions": index}
    segments = jnp.asarray(segments, jnp.int32)
    starts = jnp.concatenate([jnp.ones_like(segments[:, :1]), jnp.diff(segments, axis=1)], axis=1) != 0
    positions = index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)
    return {"tokens": jnp.asarray(tokens), "positions": positions, "segments": segments}


@functools.partial(jax.jit, static_argnums=0)
def logits(config: ModelConfig, params: Any, inputs: dict[str, Array]) -> Float[Array, "B T V"]:
    """Returns float32 logits.

    Args:
      config: the model.
      params: its parameters.
      inputs: the keywords of `Transformer`.
    """

    def apply(module: Transformer) -> Array:
        return module.logits(module(**inputs).hidden)

    return Transformer(config).apply({"params": params}, method=apply)

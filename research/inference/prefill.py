"""The prefill: all prompts read at once, before the first new token."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.inference.prompts import Prompts
from research.models.cache import Cache
from research.models.config import ModelConfig
from research.models.language_model import LanguageModelConfig, language_model
from research.models.layer_loops import TracedOnce
from research.models.paged_cache import PageTable
from research.models.transformer import Output, compute_logits
from research.models.transformer_model import TransformerModel
from research.parallel.rules import constrain


def read_tokens(
    config: LanguageModelConfig, params: Any, inputs: Mapping[str, Array], cache: Cache
) -> Output:
    """Returns the hidden states of tokens, and the cache with these tokens in it.

    Args:
      config: the model.
      params: its parameters.
      inputs: consecutive `tokens` of each sequence, their `positions`, and what else it reads.
      cache: of the tokens before.
    """
    model = language_model(config)
    if isinstance(model, TransformerModel):
        model = dataclasses.replace(model, loop=TracedOnce())
    return model.hidden(params, inputs, cache=cache)


def read_following(
    config: ModelConfig,
    params: Any,
    hidden: Float[Array, "B T D"],
    following: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
) -> tuple[Float[Array, "B T D"], Cache]:
    """Returns the states of multi-token prediction, and its cache with these tokens in it: as
    `Transformer.mtp_step`.
    """
    model = TransformerModel(config)
    return model.mtp_step(params, hidden, following, positions, cache)


def logits_of(
    config: LanguageModelConfig, params: Any, hidden: Float[Array, "B D"]
) -> Float[Array, "B V"]:
    """Returns the logits after one token of each sequence."""
    projected = language_model(config).projection(params, hidden[:, None])
    logits = compute_logits(projected)
    # Each device draws the tokens of its rows from all of their logits.
    return constrain(logits[:, 0], ("batch", None))


def next_logits(
    config: LanguageModelConfig,
    params: Any,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: Cache,
    index: Int[Array, "B"],
    **inputs: Int[Array, "B _"],
) -> tuple[Float[Array, "B V"], Cache]:
    """Returns the logits after one token of each sequence, and the cache with all tokens in it.

    Args:
      config: the model.
      params: its parameters.
      tokens: consecutive ones of each sequence.
      positions: of the tokens.
      cache: of the tokens before.
      index: of the token whose logits are returned, in [0, T).
      **inputs: what else the model reads in the prefill.
    """
    read = {"tokens": tokens, "positions": positions, **inputs}
    output = read_tokens(config, params, read, cache)
    # [B, T, D] -> [B, D]: the vocabulary's product is made for one token only.
    hidden = jnp.take_along_axis(output.hidden, index[:, None, None], axis=1)[:, 0]
    return logits_of(config, params, hidden), output.cache


@functools.partial(jax.jit, static_argnames=("config", "slots"))
def prefill(
    params: Any,
    prompts: Prompts,
    *,
    config: LanguageModelConfig,
    slots: int,
    page_table: PageTable | None = None,
) -> tuple[Float[Array, "B V"], Cache]:
    """Returns the logits after each prompt, and the cache. Nothing attends to padding.

    Args:
      params: of the model.
      prompts: from `encode`.
      config: the model.
      slots: tokens that the cache can hold.
      page_table: makes it a paged cache.
    """
    is_real, positions = real_positions(prompts.tokens, prompts.lengths)
    inputs = {}
    encoder_segments = None
    if config.structure == "prefix":
        # All of a prompt attends to all of it.
        inputs = {"prefix": is_real.astype(jnp.int32)}
    if prompts.encoder_tokens is not None:
        encoder_is_real, encoder_positions = real_positions(
            prompts.encoder_tokens, prompts.encoder_lengths
        )
        encoder_segments = encoder_is_real.astype(jnp.int32)
        inputs = {
            "encoder_tokens": prompts.encoder_tokens,
            "encoder_positions": encoder_positions,
            "encoder_segments": encoder_segments,
        }

    batch = len(prompts.tokens)
    model = language_model(config)
    cache = model.empty_cache(params, batch, slots, encoder_segments, page_table=page_table)
    last = prompts.lengths - 1
    return next_logits(config, params, prompts.tokens, positions, cache, last, **inputs)


def real_positions(
    tokens: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> tuple[Bool[Array, "B T"], Int[Array, "B T"]]:
    """Returns which tokens are no padding, and the positions of all.

    Padding has position 0: rotary rules that depend on a prompt's length take it from the largest
    position.
    """
    # lengths [2, 3] of T = 4 -> positions [[0, 1, 0, 0], [0, 1, 2, 0]].
    width = tokens.shape[1]
    index = jnp.arange(width, dtype=jnp.int32)
    index = index[None, :]
    is_real = index < lengths[:, None]
    positions = jnp.where(is_real, index, 0)
    return is_real, positions

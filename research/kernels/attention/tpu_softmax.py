"""The online softmax of the forward kernels on TPU: what is kept from tile to tile."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention.tpu_operands import bias_tile
from research.kernels.attention.tpu_tile import (
    FIRST_MAX,
    LOG2E,
    Refs,
    ScoreConfig,
    TileRange,
    TileTokens,
    capped_products,
    scores,
    tile_tokens,
)


class OnlineSoftmax(NamedTuple):
    """References to what the kernel keeps of a block of queries, in VMEM.

    Attributes:
      max_ref: the greatest score of each query up to now, in units of log 2.
      denominator_ref: Σ exp2(score − max).
      accumulator_ref: Σ exp2(score − max) v.

    Source: Milakov and Gimelshein 2018, arXiv:1805.02867, algorithm 3.
    """

    max_ref: Any
    denominator_ref: Any
    accumulator_ref: Any

    def reset(self) -> None:
        """Starts a block of queries."""
        max_ref, denominator_ref, accumulator_ref = self
        # Finite, so that the difference of two of them is 0 and not NaN.
        max_ref[...] = jnp.full_like(max_ref, FIRST_MAX)
        denominator_ref[...] = jnp.zeros_like(denominator_ref)
        accumulator_ref[...] = jnp.zeros_like(accumulator_ref)


def tile_scores(
    config: ScoreConfig,
    refs: Refs,
    products: Float[Array, "..."],
    queries: TileTokens,
    keys: TileRange,
    masked: bool,
    key_axis: int,
) -> tuple[Float[Array, "..."], float]:
    """Returns the scores of a tile, and the factor that makes their unit log 2.

    Args:
      config: of the call.
      refs: the kernel's operands.
      products: q kᵀ, [T, S] or [S, T].
      queries: of the tile.
      keys: of the tile.
      masked: whether anything in the tile may be hidden.
      key_axis: the axis of `products` that is S.
    """
    # The greatest score and the exponential apply the factor where they can: one pass less.
    if config.is_plain and not masked:
        return products, config.scale * LOG2E

    kv = tile_tokens(refs, "kv", keys, key_axis)
    capped, _ = capped_products(config, products)
    # Of a bias [T, S], as the products are: [S, T] where keys are the first axis.
    bias = bias_tile(refs, slice(None), keys.in_block)
    if bias is not None and key_axis == 0:
        bias = bias.T
    log2_scores = scores(config, refs, capped, queries, kv, bias, masked)
    return log2_scores, 1.0


def zero_past_end(
    config: ScoreConfig, values_SxH: Float[Array, "S H"], keys: TileRange, masked: bool
) -> Float[Array, "S H"]:
    """Returns the values of a tile; past the last key, where VMEM holds anything, they are 0."""
    if not masked or config.keys % keys.size == 0:
        return values_SxH

    # 900 keys in tiles of 512: rows 388 and up of the second tile are past the end. A weight of 0
    # does not hide them, since 0 · NaN is NaN.
    iota = jax.lax.broadcasted_iota(jnp.int32, values_SxH.shape, 0)
    index = keys.start + iota
    is_key = index < config.keys
    zeros = jnp.zeros_like(values_SxH)
    return jnp.where(is_key, values_SxH, zeros)


def add_sink(
    sink: Float[Array, ""], row_max: Float[Array, "..."], denominator: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Returns maximum and denominator with a head's sink, and the factor on the accumulator.

    Args:
      sink: a logit that takes part in the denominator only.
      row_max: of each query, in units of log 2.
      denominator: relative to `row_max`.
    """
    sink = sink * LOG2E
    new_max = jnp.maximum(row_max, sink)
    rescale = jnp.exp2(row_max - new_max)
    # What was summed relative to the old maximum is made relative to the new one.
    denominator = denominator * rescale
    denominator = denominator + jnp.exp2(sink - new_max)
    return new_max, denominator, rescale

"""A tile of scores inside the TPU kernels: its tokens, terms and mask, and the online softmax."""

import dataclasses
import functools
import math
import operator
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms

LANES = 128
LOG2E = math.log2(math.e)
# Scores are in units of log 2. A hidden one is so far below the first running maximum that its
# exponential is 0.
HIDDEN = -1e30
FIRST_MAX = -0.5e30

MASK_OPERANDS = ("prefix", "q_segments", "kv_segments", "q_positions", "kv_positions")
TERM_OPERANDS = ("bias", "alibi", "sinks")

Refs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ScoreConfig:
    """What is static about the scores of a call.

    Attributes:
      queries, keys: lengths T and S.
      causal, window: of the mask.
      given: names of the arrays of the mask and of the terms that are not None.
      softcap, scale: of the terms.
    """

    queries: int
    keys: int
    causal: bool
    window: int | None
    given: tuple[str, ...]
    softcap: float | None
    scale: float

    @classmethod
    def of(cls, mask: AttentionMask, terms: ScoreTerms, queries: int, keys: int) -> "ScoreConfig":
        """Returns the config of a call."""
        arrays = {name: getattr(mask, name) for name in MASK_OPERANDS}
        arrays |= {name: getattr(terms, name) for name in TERM_OPERANDS}
        # bias and sinks -> ("bias", "sinks")
        given = tuple(name for name, array in arrays.items() if array is not None)
        return cls(
            queries=queries,
            keys=keys,
            causal=mask.causal,
            window=mask.window,
            given=given,
            softcap=terms.softcap,
            scale=terms.scale,
        )

    @property
    def is_plain(self) -> bool:
        """Whether scores are q kᵀ times a constant, which can be applied with the exponential."""
        return self.softcap is None and "bias" not in self.given and "alibi" not in self.given


class TileRange(NamedTuple):
    """The tokens of one side of a tile.

    Attributes:
      start: of the first token in the sequence.
      offset: of the first token in the block that is in VMEM.
      size: tokens.
    """

    start: Any
    offset: Any
    size: int

    @property
    def in_block(self) -> pl.Slice:
        """The tokens in the block that is in VMEM."""
        return pl.ds(self.offset, self.size)


@dataclasses.dataclass(frozen=True)
class TileTokens:
    """What the mask compares of the tokens of one side, as a row or a column of a tile.

    Attributes:
      index: of each token in the sequence.
      position: of the mask; the index where the mask has no positions.
      segment: of the mask, or None.
    """

    index: Int[Array, "..."]
    position: Int[Array, "..."]
    segment: Int[Array, "..."] | None


def tile_tokens(refs: Refs, side: str, tokens: TileRange, axis: int) -> TileTokens:
    """Returns the tokens of one side of a tile.

    Args:
      refs: the kernel's operands.
      side: `q` or `kv`.
      tokens: which.
      axis: 0 for a column, [size, 1], and 1 for a row, [1, size].
    """
    # Tokens 512 and up, 128 of them: [[512, 513, ..., 639]], or the same as a column.
    shape = (tokens.size, 1) if axis == 0 else (1, tokens.size)
    iota = jax.lax.broadcasted_iota(jnp.int32, shape, axis)
    index = tokens.start + iota

    def vector(name: str) -> Array | None:
        if name not in refs:
            return None
        row = refs[name][0, :, tokens.in_block]
        return lanes_to_column(row) if axis == 0 else row

    position = vector(f"{side}_positions")
    if position is None:
        position = index
    segment = vector(f"{side}_segments")
    return TileTokens(index, position, segment)


def lanes_to_column(row: Int[Array, "1 size"]) -> Int[Array, "size 1"]:
    """Returns a row of lanes as a column."""
    # A transpose takes whole tiles: [1, size] -> [128, size] -> [size, 128] -> [size, 1]
    _, size = row.shape
    tile = jnp.broadcast_to(row, (LANES, size))
    return tile.T[:, :1]


def repeat_lanes(x: Float[Array, "rows 128"], width: int) -> Float[Array, "rows width"]:
    """Returns as many columns as asked for, of an array whose columns are all the same."""
    if width <= LANES:
        return x[:, :width]
    # [rows, 128] -> [rows, 256] -> [rows, 192]
    copies = -(-width // LANES)
    repeated = jnp.concatenate([x] * copies, axis=1)
    return repeated[:, :width]


def capped_products(
    config: ScoreConfig, products: Float[Array, "..."]
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """Returns cap(scale · q kᵀ) in units of log 2, and the derivative of the cap.

    Args:
      config: of the call.
      products: q kᵀ, either way round.
    """
    if config.softcap is None:
        return products * (config.scale * LOG2E), None
    # d/dx softcap · tanh(x / softcap) = 1 − tanh²(x / softcap)
    bounded = jnp.tanh(products * (config.scale / config.softcap))
    capped = bounded * (config.softcap * LOG2E)
    derivative = 1 - bounded * bounded
    return capped, derivative


def scores(
    config: ScoreConfig,
    refs: Refs,
    capped: Float[Array, "..."],
    q: TileTokens,
    kv: TileTokens,
    bias: Float[Array, "..."] | None,
    masked: bool,
) -> Float[Array, "..."]:
    """Returns the scores of a tile in units of log 2, hidden ones far below all others.

    Args:
      config: of the call.
      refs: the kernel's operands.
      capped: of `capped_products`.
      q, kv: the tokens of the two sides.
      bias: of the tile, where there is one.
      masked: whether anything in the tile may be hidden.
    """
    s = capped
    if bias is not None:
        bias = bias.astype(jnp.float32)
        s = s + bias * LOG2E

    # alibi · |p_t − p_s|, with one slope for the head
    if "alibi" in config.given:
        distance = jnp.abs(q.position - kv.position)
        distance = distance.astype(jnp.float32)
        slope = refs["alibi"] * LOG2E
        s = s - slope * distance

    if masked:
        visible = _visible(config, refs, q, kv)
        s = jnp.where(visible, s, HIDDEN)
    return s


def _visible(config: ScoreConfig, refs: Refs, q: TileTokens, kv: TileTokens) -> Bool[Array, "..."]:
    # Each comparison costs a fifth of a tile: only those that can fail are made.
    conditions = []
    if config.keys % kv.index.size:
        conditions.append(kv.index < config.keys)
    if config.queries % q.index.size:
        conditions.append(q.index < config.queries)

    by_position = _visible_by_position(config, refs, q, kv)
    if q.segment is not None:
        conditions.append(q.segment == kv.segment)
        conditions.append(kv.segment > 0)

    # A row and a column, [1, T] and [S, 1], give [S, T].
    shape = jnp.broadcast_shapes(q.index.shape, kv.index.shape)
    visible = jnp.ones(shape, bool)
    for condition in conditions + by_position:
        visible &= condition
    return visible


def _visible_by_position(
    config: ScoreConfig, refs: Refs, q: TileTokens, kv: TileTokens
) -> list[Bool[Array, "..."]]:
    # As `AttentionMask` defines it, but for segments.
    conditions = []
    if config.causal:
        conditions.append(q.position >= kv.position)
    if config.window is not None:
        distance = jnp.abs(q.position - kv.position)
        conditions.append(distance < config.window)

    # Keys of the prefix are visible whatever the other conditions say.
    if conditions and "prefix" in config.given:
        visible = functools.reduce(operator.and_, conditions)
        conditions = [visible | (kv.position < refs["prefix"])]
    return conditions


def dot(
    a: Float[Array, "..."], b: Float[Array, "..."], contract: tuple[int, int]
) -> Float[Array, "..."]:
    """Returns the product of two matrices in float32, contracted over an axis of each."""
    a_axis, b_axis = contract
    # [T, H] and [S, H] with contract (1, 1) -> [T, S]
    dimension_numbers = (((a_axis,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimension_numbers, preferred_element_type=jnp.float32)

"""What a tile of scores is, inside the TPU kernels: terms, mask, and the operands that they
need.
"""

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms

LANES = 128
LOG2E = math.log2(math.e)
# Scores are kept in units of log 2. A hidden one lies so far below the least maximum that its
# exponential is 0.
HIDDEN, LEAST = -1e30, -0.5e30

Refs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Rules:
    """All that is static about a call.

    Attributes:
      queries, keys: lengths T and S.
      causal, window: of the mask.
      given: names of the operands that are there.
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
    def of(cls, mask: AttentionMask, terms: ScoreTerms, queries: int, keys: int) -> "Rules":
        """Returns the rules of a call."""
        named = {name: getattr(mask, name) for name in MASK_OPERANDS}
        named |= {name: getattr(terms, name) for name in ("bias", "alibi", "sinks")}
        given = tuple(name for name, value in named.items() if value is not None)
        return cls(queries, keys, mask.causal, mask.window, given, terms.softcap, terms.scale)

    @property
    def plain(self) -> bool:
        """Whether scores are q kᵀ times a constant, which the exponential takes along."""
        return self.softcap is None and "bias" not in self.given and "alibi" not in self.given


MASK_OPERANDS = ("prefix", "q_segments", "kv_segments", "q_positions", "kv_positions")


def row_of(refs: Refs, name: str, start: Any, size: int) -> Int[Array, "1 size"]:
    """Returns part of a token vector as a row of lanes."""
    return refs[name][0, :, pl.ds(start, size)]


def column_of(row: Int[Array, "1 size"]) -> Int[Array, "size 1"]:
    """Returns a row of lanes as a column."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def spread(x: Float[Array, "rows 128"], width: int) -> Float[Array, "rows width"]:
    """Returns columns that are all alike in another number."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * -(-width // LANES), axis=1)[:, :width]


@dataclasses.dataclass(frozen=True)
class Side:
    """The tokens of one side of a tile, broadcast along the other.

    Attributes:
      index: of each token in the sequence.
      position: by the mask; the index where it says nothing.
      segment: or None.
    """

    index: Int[Array, "..."]
    position: Int[Array, "..."]
    segment: Int[Array, "..."] | None


def side(refs: Refs, prefix: str, start: Any, offset: Any, size: int, axis: int) -> Side:
    """Returns the tokens `start` to `start + size` of the sequence.

    Args:
      refs: the kernel's operands.
      prefix: `q` or `kv`.
      start: in the sequence.
      offset: in the blocks that the kernel holds.
      size: tokens.
      axis: 0 for a column, 1 for a row.
    """
    shape = (size, 1) if axis == 0 else (1, size)
    index = start + jax.lax.broadcasted_iota(jnp.int32, shape, axis)

    def vector(name: str) -> Array | None:
        if name not in refs:
            return None
        row = row_of(refs, name, offset, size)
        return column_of(row) if axis == 0 else row

    position = vector(f"{prefix}_positions")
    return Side(index, index if position is None else position, vector(f"{prefix}_segments"))


def scores(
    rules: Rules,
    refs: Refs,
    products: Float[Array, "..."],
    q: Side,
    kv: Side,
    bias: Callable[[], Array],
    masked: bool,
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """Returns the scores of a tile in units of log 2, hidden ones far below all others, and the
    slope of the cap.

    Args:
      rules: of the call.
      refs: the kernel's operands.
      products: q kᵀ, either way round.
      q, kv: the tokens of the two sides.
      bias: gives the tile's bias.
      masked: whether anything in the tile may be hidden.
    """
    slope = None
    if rules.softcap is None:
        s = products * (rules.scale * LOG2E)
    else:
        bounded = jnp.tanh(products * (rules.scale / rules.softcap))
        s, slope = bounded * (rules.softcap * LOG2E), 1 - bounded * bounded
    if "bias" in rules.given:
        s = s + bias().astype(jnp.float32) * LOG2E
    if "alibi" in rules.given:
        distance = jnp.abs(q.position - kv.position).astype(jnp.float32)
        s = s - (refs["alibi"] * LOG2E) * distance
    return (jnp.where(_visible(rules, refs, q, kv), s, HIDDEN) if masked else s), slope


def _visible(rules: Rules, refs: Refs, q: Side, kv: Side) -> Bool[Array, "..."]:
    # Each comparison costs a fifth of a tile: only those that can fail are made.
    seen = []
    if rules.keys % kv.index.size:
        seen.append(kv.index < rules.keys)
    if rules.queries % q.index.size:
        seen.append(q.index < rules.queries)
    rule = []
    if rules.causal:
        rule.append(q.position >= kv.position)
    if rules.window is not None:
        rule.append(jnp.abs(q.position - kv.position) < rules.window)
    if rule and "prefix" in rules.given:
        rule = [functools.reduce(operator.and_, rule) | (kv.position < refs["prefix"])]
    if q.segment is not None:
        seen += [q.segment == kv.segment, kv.segment > 0]
    shape = jnp.broadcast_shapes(q.index.shape, kv.index.shape)
    return functools.reduce(operator.and_, seen + rule, jnp.ones(shape, bool))

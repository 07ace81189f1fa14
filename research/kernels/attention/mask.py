"""What attention may see, as a description: a few integers a token, never a `[T, S]` array."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.core.errors import UserError
from research.core.trees import node


class Span(NamedTuple):
    """Tokens that follow each other: where they start, which may be traced, and how many they are,
    which is static.
    """

    start: int | Int[Array, ""]
    size: int


@node(static=("causal", "window"))
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Says which keys a query sees.

    Query t sees key s where

        ((not causal or p_t >= p_s) and (window is None or |p_t - p_s| < window)  or  p_s < prefix)
        and segment_t == segment_s != 0

    with p the positions. A query that sees nothing gets zeros.

    Attributes:
      causal: static. Keys after the query are hidden.
      window: static, at least 1, or None. Keys at this distance or further are hidden; 1 leaves the
          query's own key.
      prefix: the number of leading positions that every query sees, a sequence; None is no prefix.
      q_segments, kv_segments: the packed document of each token, 0 is padding; both or neither.
      q_positions, kv_positions: default to the index in the array, counted from the offset of the
        side. Fast paths skip whole blocks only under the default, so give positions only where the
        index does not tell the order: queries that follow a cache, or keys out of order. Packed
            documents need none.
      q_offset, kv_offset: the position of the first query and of the first key, where positions are
          not given; None is
        0. A device that holds part of each row gives the index in the row at which its part starts.

    Raises:
      UserError: a window below 1.
    """

    causal: bool = False
    window: int | None = None
    prefix: Int[Array, "B"] | None = None
    q_segments: Int[Array, "B T"] | None = None
    kv_segments: Int[Array, "B S"] | None = None
    q_positions: Int[Array, "B T"] | None = None
    kv_positions: Int[Array, "B S"] | None = None
    q_offset: Int[Array, ""] | None = None
    kv_offset: Int[Array, ""] | None = None

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise UserError(
                "window", self.window, "must be at least 1: a query sees at least its own key."
            )
        assert (self.q_segments is None) == (self.kv_segments is None), (
            "segments are given on both sides or on neither"
        )
        for side in ("q", "kv"):
            given = getattr(self, f"{side}_positions") is not None
            assert not (given and getattr(self, f"{side}_offset") is not None), (
                f"{side}: positions and their offset"
            )

    def with_positions(self, batch: int, queries: int, keys: int) -> "AttentionMask":
        """Returns the same mask with positions in the place of offsets, for kernels that know only
        positions.

        Args:
          batch: B.
          queries: T.
          keys: S.
        """
        if self.q_offset is None and self.kv_offset is None:
            return self
        # An offset of one side alone changes nothing on the other: what has none keeps its index.
        positions = {}
        for side, length in (("q", queries), ("kv", keys)):
            offset = getattr(self, f"{side}_offset")
            if offset is not None:
                index = offset + jnp.arange(length, dtype=jnp.int32)
                positions |= {
                    f"{side}_positions": jnp.broadcast_to(index, (batch, length)),
                    f"{side}_offset": None,
                }
        return dataclasses.replace(self, **positions)

    def dense(self, query_length: int, key_length: int) -> Bool[Array, "B 1 T S"]:
        """Returns the mask as an array, for the reference and for pictures; B is 1 where nothing
        differs by sequence.

        Args:
          query_length: T.
          key_length: S.
        """
        return self.block(Span(0, query_length), Span(0, key_length))

    def block(self, queries: Span, keys: Span) -> Bool[Array, "B 1 T S"]:
        """Returns the part of the dense mask that a kernel needs at a time.

        Args:
          queries: those of the part, all of them given tokens.
          keys: those of the part, all of them given tokens.
        """
        p_t = _positions(self.q_positions, self.q_offset, queries)[:, :, None]
        p_s = _positions(self.kv_positions, self.kv_offset, keys)[:, None, :]
        visible = jnp.ones((1, queries.size, keys.size), dtype=bool)
        if self.causal:
            visible &= p_t >= p_s
        if self.window is not None:
            visible &= jnp.abs(p_t - p_s) < self.window
        if self.prefix is not None:
            visible |= p_s < self.prefix[:, None, None]
        if self.q_segments is not None:
            q_segments = _cut(self.q_segments, queries)[:, :, None]
            kv_segments = _cut(self.kv_segments, keys)[:, None, :]
            visible &= (q_segments == kv_segments) & (kv_segments != 0)
        return visible[:, None]

    def distance(self, queries: Span, keys: Span) -> Float[Array, "B 1 T S"]:
        """Returns |p_t − p_s| of part of the mask, in float32; B is 1 where the positions are the
        indices.

        Args:
          queries: those of the part, all of them given tokens.
          keys: those of the part, all of them given tokens.
        """
        p_t = _positions(self.q_positions, self.q_offset, queries)
        p_s = _positions(self.kv_positions, self.kv_offset, keys)
        return jnp.abs(p_t[:, None, :, None] - p_s[:, None, None, :]).astype(jnp.float32)

    def reach(self, start: int, stop: int, key_length: int) -> slice:
        """Returns the keys outside which queries `start` to `stop` see nothing, as far as the
        indices alone tell.
        """
        placed = (self.q_positions, self.kv_positions, self.q_offset, self.kv_offset)
        if self.prefix is not None or any(each is not None for each in placed):
            return slice(0, key_length)
        first, last = 0, key_length
        if self.window is not None:
            first, last = max(0, start - self.window + 1), min(last, stop + self.window - 1)
        if self.causal:
            last = min(last, stop)
        # A block of keys is never empty: queries past the last key they may see still get their
        # zeros.
        return slice(min(first, key_length - 1), max(last, min(first, key_length - 1) + 1))


def _positions(
    given: Int[Array, "B L"] | None, offset: Int[Array, ""] | None, part: Span
) -> Int[Array, "B P"]:
    if given is not None:
        return _cut(given, part)
    first = part.start if offset is None else part.start + offset
    return first + jnp.arange(part.size)[None]


def _cut(given: Int[Array, "B L"], part: Span) -> Int[Array, "B P"]:
    return jax.lax.dynamic_slice_in_dim(given, part.start, part.size, axis=1)

"""The attention mask as a description: a few integers per token, never a `[T, S]` array."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from research.core.errors import UserError
from research.core.trees import node


class Span(NamedTuple):
    """Consecutive tokens.

    Attributes:
      start: the first one, which may be traced.
      size: how many, static.
    """

    start: int | Int[Array, ""]
    size: int


@node(static=("causal", "window"))
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Which keys each query attends to.

    Query t attends to key s where

        ((not causal or p_t >= p_s) and (window is None or |p_t - p_s| < window)  or  p_s < prefix)
        and segment_t == segment_s != 0

    with p the positions. A query that attends to no key gets zeros.

    Causal with a window of 2 is

        t / s  0 1 2 3
            0  x . . .
            1  x x . .
            2  . x x .
            3  . . x x

    Attributes:
      causal: static. Keys after the query are hidden.
      window: static, at least 1, or None. Keys at this distance or further are hidden; 1 leaves the
          query's own key.
      prefix: for each sequence, how many leading positions every query attends to; None is no
          prefix.
      q_segments, kv_segments: the packed document of each token, 0 is padding; both or neither.
      q_positions, kv_positions: default to the index in the array, counted from the offset of the
          side. Fast paths skip whole blocks only under the default, so give positions only where
          the index is not the order: queries that follow a cache, or keys out of order. Packed
          documents need none.
      q_offset, kv_offset: the position of the first query and of the first key, where positions are
          not given; None is 0. A device that holds part of each row gives the index in the row at
          which its part starts.

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
                "window",
                self.window,
                "must be at least 1: a query attends at least to its own key.",
            )

        with_segments = {self.q_segments is not None, self.kv_segments is not None}
        assert len(with_segments) == 1, "segments are given on both sides or on neither"
        for side in ("q", "kv"):
            positions = getattr(self, f"{side}_positions")
            offset = getattr(self, f"{side}_offset")
            assert positions is None or offset is None, f"{side}: positions and their offset"

    def with_positions(self, batch: int, num_queries: int, num_keys: int) -> "AttentionMask":
        """Returns the same mask with positions instead of offsets, which kernels do not take.

        Args:
          batch: B.
          num_queries: T.
          num_keys: S.
        """
        if self.q_offset is None and self.kv_offset is None:
            return self

        # A side without an offset keeps its positions: None is the index.
        changes = {}
        for side, length in (("q", num_queries), ("kv", num_keys)):
            offset = getattr(self, f"{side}_offset")
            if offset is not None:
                # Offset 4, two sequences of three tokens: [[4, 5, 6], [4, 5, 6]]
                positions = offset + jnp.arange(length, dtype=jnp.int32)
                positions = jnp.broadcast_to(positions, (batch, length))
                changes[f"{side}_positions"] = positions
                changes[f"{side}_offset"] = None
        return dataclasses.replace(self, **changes)

    def dense(self, num_queries: int, num_keys: int) -> Bool[Array, "B 1 T S"]:
        """Returns the mask as an array, for the reference and for pictures; B is 1 where nothing
        differs by sequence.

        Args:
          num_queries: T.
          num_keys: S.
        """
        queries = Span(0, num_queries)
        keys = Span(0, num_keys)
        return self.block(queries, keys)

    def block(self, queries: Span, keys: Span) -> Bool[Array, "B 1 T S"]:
        """Returns the part of the dense mask that a kernel needs at a time.

        Args:
          queries, keys: indices into the arrays of the mask, in range.
        """
        # [B, T] -> [B, T, 1] and [B, S] -> [B, 1, S]
        p_t = _positions(self.q_positions, self.q_offset, queries)[:, :, None]
        p_s = _positions(self.kv_positions, self.kv_offset, keys)[:, None, :]

        visible = jnp.ones((1, queries.size, keys.size), dtype=bool)
        if self.causal:
            visible &= p_t >= p_s
        if self.window is not None:
            distance = jnp.abs(p_t - p_s)
            visible &= distance < self.window
        if self.prefix is not None:
            prefix = self.prefix[:, None, None]
            visible |= p_s < prefix
        if self.q_segments is not None:
            q_segments = _span_of(self.q_segments, queries)[:, :, None]
            kv_segments = _span_of(self.kv_segments, keys)[:, None, :]
            same_segment = q_segments == kv_segments
            visible &= same_segment & (kv_segments != 0)
        # [B, T, S] -> [B, 1, T, S]
        return visible[:, None]

    def distance(self, queries: Span, keys: Span) -> Float[Array, "B 1 T S"]:
        """Returns |p_t − p_s| of part of the mask, in float32; B is 1 where the positions are the
        indices.

        Args:
          queries, keys: indices into the arrays of the mask, in range.
        """
        p_t = _positions(self.q_positions, self.q_offset, queries)
        p_s = _positions(self.kv_positions, self.kv_offset, keys)
        # [B, 1, T, 1] - [B, 1, 1, S] -> [B, 1, T, S]
        distance = p_t[:, None, :, None] - p_s[:, None, None, :]
        return jnp.abs(distance).astype(jnp.float32)

    def reach(self, start: int, stop: int, num_keys: int) -> slice:
        """Returns the range of key indices outside which every key is hidden from queries
        start:stop.

        It uses causal and window alone; with positions, an offset or a prefix it is all keys. It is
        never empty: queries that attend to no key still get their zeros.

        Args:
          start: the first query.
          stop: the query after the last one.
          num_keys: S.
        """
        unknown = (self.prefix, self.q_positions, self.kv_positions, self.q_offset, self.kv_offset)
        if any(x is not None for x in unknown):
            return slice(0, num_keys)

        # start 5, stop 9, causal, window 3 -> keys 3:9
        first = 0
        last = num_keys
        if self.window is not None:
            first = max(0, start - self.window + 1)
            last = min(last, stop + self.window - 1)
        if self.causal:
            last = min(last, stop)
        first = min(first, num_keys - 1)
        return slice(first, max(last, first + 1))


def _positions(
    positions: Int[Array, "B length"] | None, offset: Int[Array, ""] | None, tokens: Span
) -> Int[Array, "#B span"]:
    """Returns the positions of some tokens: those given, or the indices from an offset on."""
    if positions is not None:
        return _span_of(positions, tokens)
    first = tokens.start
    if offset is not None:
        first = tokens.start + offset
    # Span(128, 3) -> [[128, 129, 130]]
    return first + jnp.arange(tokens.size)[None]


def _span_of(x: Int[Array, "B length"], tokens: Span) -> Int[Array, "B span"]:
    return lax.dynamic_slice_in_dim(x, tokens.start, tokens.size, axis=1)

"""Which blocks of queries and keys the GPU kernels visit: found before, read in the kernel.

A block of the grid holds one tile of queries, or of keys, and visits blocks of the other side. It
never visits those that the mask hides altogether.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from research.kernels.attention.gpu_plan import Plan, fill
from research.kernels.attention.mask import AttentionMask

# What a block of queries and a block of keys have in common: all is visible, so that no mask is
# needed; some may be visible; nothing is, so that it is never visited.
VISIBLE = 0
PARTIAL = 1
HIDDEN_BLOCK = 2


def block_kinds(
    mask: AttentionMask, plan: Plan, block_q: int, block_kv: int
) -> Int[Array, "sequences q_blocks kv_blocks"]:
    """Returns `VISIBLE`, `PARTIAL` or `HIDDEN_BLOCK` for each block of queries and of keys.

    It compares the least and the greatest position and segment of each block, and no tokens.
    `sequences` is B, or 1 where no sequence differs from another.

    Args:
      mask: the description.
      plan: the lengths.
      block_q, block_kv: tokens per block; they divide the padded lengths.
    """
    # Whether something is visible, and everything: [sequences, q_blocks, kv_blocks]
    some, every = _shown_by_positions(mask, plan, block_q, block_kv)
    if mask.q_segments is not None:
        q = _segment_range(mask.q_segments, plan.padded_queries, block_q)
        kv = _segment_range(mask.kv_segments, plan.padded_keys, block_kv)
        q = q.of_queries()
        kv = kv.of_keys()
        # By their ranges: blocks of segments [1, 3] and [3, 5], ends included, may share segment 3.
        q_begins_before = q.least <= kv.greatest
        kv_begins_before = kv.least <= q.greatest
        some &= q_begins_before & kv_begins_before
        both_single = q.single & kv.single
        same_segment = q.least == kv.least
        every &= both_single & same_segment

    # Padded keys are hidden: 300 keys end within the block 256:384.
    kv_starts = jnp.arange(0, plan.padded_keys, block_kv)
    kv_starts = kv_starts[None, None]
    some &= kv_starts < plan.keys
    kv_ends = kv_starts + block_kv
    every &= kv_ends <= plan.keys

    # The last block of queries may be past the end altogether: its rows are cut off, and nothing is
    # computed for them.
    q_starts = jnp.arange(0, plan.padded_queries, block_q)
    inside = q_starts < plan.queries
    some &= inside[None, :, None]

    seen = jnp.where(every, VISIBLE, PARTIAL)
    kinds = jnp.where(some, seen, HIDDEN_BLOCK)
    return kinds.astype(jnp.int32)


def _shown_by_positions(
    mask: AttentionMask, plan: Plan, block_q: int, block_kv: int
) -> tuple[Array, Array]:
    """Returns whether something, and everything, is visible by causality, window and prefix."""
    q = _position_range(mask.q_positions, plan.queries, plan.padded_queries, block_q)
    q = q.of_queries()
    kv = _position_range(mask.kv_positions, plan.keys, plan.padded_keys, block_kv)
    kv = kv.of_keys()
    q_blocks = plan.padded_queries // block_q
    kv_blocks = plan.padded_keys // block_kv
    some = jnp.ones((1, q_blocks, kv_blocks), bool)
    every = some

    if mask.causal:
        # For queries 128:256 some of the keys 192:320 are visible, and all of 0:128.
        last_sees_first = q.greatest >= kv.least
        some = some & last_sees_first
        first_sees_last = q.least >= kv.greatest
        every = every & first_sees_last
    if mask.window is not None:
        # Queries 128:256, keys 0:64: the nearest are 65 apart, the farthest 255.
        gap_after_keys = q.least - kv.greatest
        gap_after_queries = kv.least - q.greatest
        nearest = jnp.maximum(gap_after_keys, gap_after_queries)
        reach_back = q.greatest - kv.least
        reach_ahead = kv.greatest - q.least
        farthest = jnp.maximum(reach_back, reach_ahead)
        some = some & (nearest < mask.window)
        every = every & (farthest < mask.window)
    if mask.prefix is not None:
        # [B] -> [B, 1, 1]
        prefix = mask.prefix[:, None, None]
        begins_in_prefix = kv.least < prefix
        some = some | begins_in_prefix
        ends_in_prefix = kv.greatest < prefix
        every = every | ends_in_prefix
    return some, every


class _Range(NamedTuple):
    """The least and the greatest number of a token in each block, `[sequences, blocks]`.

    Attributes:
      least, greatest: positions or segments.
      single: whether all tokens of a block are of one segment, without padding.
    """

    least: Array
    greatest: Array
    single: Array | None = None

    def of_queries(self) -> "_Range":
        """Returns it as `[sequences, q_blocks, 1]`."""

        def with_keys_axis(x: Array) -> Array:
            return x[:, :, None]

        return jax.tree.map(with_keys_axis, self)

    def of_keys(self) -> "_Range":
        """Returns it as `[sequences, 1, kv_blocks]`."""

        def with_queries_axis(x: Array) -> Array:
            return x[:, None]

        return jax.tree.map(with_queries_axis, self)


def _position_range(
    positions: Int[Array, "sequences length"] | None, length: int, padded_length: int, block: int
) -> _Range:
    """Returns the range of positions of each block, over the tokens that are there."""
    if positions is None:
        positions = jnp.arange(length)[None]
    # Padded tokens repeat the last position, which changes no range: [B, 200] -> [B, 256]
    padding = padded_length - length
    positions = jnp.pad(positions, ((0, 0), (0, padding)), mode="edge")

    # [B, 256] -> [B, 4, 64]
    sequences = positions.shape[0]
    blocks = positions.reshape(sequences, -1, block)
    least = jnp.min(blocks, axis=-1)
    greatest = jnp.max(blocks, axis=-1)
    return _Range(least, greatest)


def _segment_range(segments: Int[Array, "B length"], padded_length: int, block: int) -> _Range:
    """Returns the range of segments of each block, over the tokens that are not padding."""
    # [B, 200] -> [B, 256] -> [B, 4, 64]
    sequences = segments.shape[0]
    segments = fill(segments, padded_length)
    blocks = segments.reshape(sequences, -1, block)

    # [3, 3, 4, 0] -> 3 and 4. In a block of padding alone the least is above the greatest, so that
    # it meets no other block.
    bounds = jnp.iinfo(blocks.dtype)
    padding = blocks == 0
    without_padding = jnp.where(padding, bounds.max, blocks)
    least = jnp.min(without_padding, axis=-1)
    without_padding = jnp.where(padding, bounds.min, blocks)
    greatest = jnp.max(without_padding, axis=-1)

    no_padding = jnp.all(blocks != 0, axis=-1)
    single = (least == greatest) & no_padding
    return _Range(least, greatest, single)


def visits(
    kinds: Int[Array, "sequences blocks others"],
) -> tuple[Int[Array, "sequences blocks others"], Int[Array, "sequences blocks 2"]]:
    """Returns for each block the other side's blocks in the order of their visit, and two counts.

    Blocks that are visible altogether come first and need no mask; the first count is theirs. Then
    come those that are visible in part; the second count is that of both. What comes after is never
    visited. Kinds [2, 0, 1, 0] give the order [1, 3, 2, 0] and the counts (2, 3).
    """
    order = jnp.argsort(kinds, axis=-1, stable=True)
    unmasked = jnp.sum(kinds < PARTIAL, axis=-1)
    visited = jnp.sum(kinds < HIDDEN_BLOCK, axis=-1)
    counts = jnp.stack([unmasked, visited], axis=-1)
    return order.astype(jnp.int32), counts.astype(jnp.int32)


@dataclasses.dataclass(frozen=True)
class Visits:
    """The blocks that one block of the grid visits: its row of the arrays of `visits`, in a kernel.

    Attributes:
      order_ref: the order, `[sequences, blocks, others]`.
      row: the sequence and the block.
      tokens: tokens of a visited block.
      unmasked: how many of the visits, the first ones, need no mask.
      total: how many visits.
    """

    order_ref: Any
    row: tuple[Any, Array]
    tokens: int
    unmasked: Array
    total: Array

    def start(self, step: Array) -> Array:
        """Returns the first token of the block that a step visits."""
        place = (*self.row, step)
        block = self.order_ref[place]
        return block * self.tokens

    def fold(self, step: Callable[..., Any], carry: Any) -> Any:
        """Folds `carry = step(index, carry, masked=...)` over all visits."""
        unmasked_step = functools.partial(step, masked=False)
        masked_step = functools.partial(step, masked=True)
        carry = lax.fori_loop(0, self.unmasked, unmasked_step, carry)
        return lax.fori_loop(self.unmasked, self.total, masked_step, carry)


def read_visits(order_ref: Any, counts_ref: Any, batch: Array, block: Array, tokens: int) -> Visits:
    """Loads the counts of a block's visits.

    Args:
      order_ref, counts_ref: of `visits`.
      batch: the sequence.
      block: the block of the grid.
      tokens: tokens of a visited block.
    """
    # The arrays have one sequence where no sequence differs from another.
    sequences = order_ref.shape[0]
    sequence = batch if sequences > 1 else 0
    row = (sequence, block)
    unmasked = counts_ref[(*row, 0)]
    total = counts_ref[(*row, 1)]
    return Visits(order_ref, row, tokens, unmasked, total)

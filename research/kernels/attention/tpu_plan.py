"""Which tiles of scores a TPU kernel computes, and which of them need the mask applied."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Int

from research.kernels.attention.mask import AttentionMask


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Sizes of a tile of scores, in tokens; `keys` is a multiple of 128.

    Attributes:
      queries: queries of a tile.
      keys: keys of a tile.
      resident: keys (forward) or queries (backward) that are in VMEM together, a multiple of both.
      transposed: whether the forward pass computes a tile as [keys, queries], and not as
        [queries, keys].
    """

    queries: int = 512
    keys: int = 512
    resident: int = 16384
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class TilePlan:
    """The inner tiles that each outer block visits, in chunks; those that need no mask come first.

    Attributes:
      order: indices of tiles within their chunk, flattened from [rows, outer, chunks, tiles].
      counts: how many tiles need no mask, and how many are visited at all, flattened from
        [rows, outer, chunks, 2].
      rows: rows of the batch that differ; 1 where all of them have the same plan.
    """

    order: Int[Array, "tiles"]
    counts: Int[Array, "pairs"]
    rows: int


def cover(size: int, block: int) -> int:
    """Returns how many blocks cover `size`."""
    return -(-size // block)


def _in_blocks(
    values: Int[Array, "B tokens"], block: int, fill: int
) -> Int[Array, "B blocks block"]:
    rows, tokens = values.shape
    padding = -tokens % block

    # [3, 4, 5] in blocks of 2 -> [[3, 4], [5, fill]]
    widths = ((0, 0), (0, padding))
    padded = jnp.pad(values, widths, constant_values=fill)
    return padded.reshape(rows, -1, block)


def _extremes(
    values: Int[Array, "B tokens"] | None, length: int, block: int
) -> tuple[Int[Array, "B blocks"], Int[Array, "B blocks"]]:
    """Returns the least and the greatest value of each block of tokens; None is their indices."""
    limits = jnp.iinfo(jnp.int32)
    highest = limits.max // 2
    lowest = limits.min // 2
    if values is None:
        values = jnp.arange(length, dtype=jnp.int32)
        values = values[None]

    # Padding never wins: [3, 4, 5] in blocks of 2 -> least [3, 5], greatest [4, 5].
    padded_high = _in_blocks(values, block, fill=highest)
    least = padded_high.min(-1)
    padded_low = _in_blocks(values, block, fill=lowest)
    greatest = padded_low.max(-1)
    return least, greatest


def _query_extremes(
    values: Int[Array, "B T"] | None, queries: int, blocks: BlockSizes
) -> tuple[Int[Array, "B outer 1"], Int[Array, "B outer 1"]]:
    least, greatest = _extremes(values, queries, blocks.queries)
    return least[:, :, None], greatest[:, :, None]


def _key_extremes(
    values: Int[Array, "B S"] | None, keys: int, blocks: BlockSizes
) -> tuple[Int[Array, "B 1 inner"], Int[Array, "B 1 inner"]]:
    least, greatest = _extremes(values, keys, blocks.keys)
    return least[:, None, :], greatest[:, None, :]


def tile_visibility(
    mask: AttentionMask, queries: int, keys: int, blocks: BlockSizes
) -> tuple[Bool[Array, "B outer inner"], Bool[Array, "B outer inner"]]:
    """Returns in which tiles any pair may be visible, and in which all pairs are.

    Tiles are [B, blocks of queries, blocks of keys]; B is 1 where all rows have the same mask. The
    first answer may be True for a tile without a visible pair; so may the second be False for a
    tile whose pairs are all visible.

    Args:
      mask: of the call.
      queries, keys: T and S.
      blocks: sizes of a tile.
    """
    q_blocks = cover(queries, blocks.queries)
    k_blocks = cover(keys, blocks.keys)
    any_visible, all_visible = _visible_by_position(mask, queries, keys, blocks)

    if mask.q_segments is not None:
        any_same, all_same = _same_segment(mask, queries, keys, blocks)
        any_visible &= any_same
        all_visible &= all_same

    # A short last block needs the mask, which hides what is past the end.
    if keys % blocks.keys:
        last = k_blocks - 1
        is_whole = jnp.arange(k_blocks) < last
        all_visible &= is_whole[None, None]
    if queries % blocks.queries:
        last = q_blocks - 1
        is_whole = jnp.arange(q_blocks) < last
        all_visible &= is_whole[None, :, None]
    return any_visible, all_visible & any_visible


def _visible_by_position(
    mask: AttentionMask, queries: int, keys: int, blocks: BlockSizes
) -> tuple[Bool[Array, "B outer inner"], Bool[Array, "B outer inner"]]:
    q_first, q_last = _query_extremes(mask.q_positions, queries, blocks)
    k_first, k_last = _key_extremes(mask.kv_positions, keys, blocks)
    q_blocks = cover(queries, blocks.queries)
    k_blocks = cover(keys, blocks.keys)
    any_visible = jnp.ones((1, q_blocks, k_blocks), bool)
    all_visible = any_visible

    # Queries 4:8 and keys 6:10: query 7 may attend to key 6, query 4 not to key 9.
    if mask.causal:
        any_visible &= q_last >= k_first
        all_visible &= q_first >= k_last

    # The nearest pair decides whether any is visible, the farthest whether all are.
    if mask.window is not None:
        nearest_behind = q_first - k_last
        any_visible &= nearest_behind < mask.window
        nearest_ahead = k_first - q_last
        any_visible &= nearest_ahead < mask.window
        farthest_behind = q_last - k_first
        all_visible &= farthest_behind < mask.window
        farthest_ahead = k_last - q_first
        all_visible &= farthest_ahead < mask.window

    if mask.prefix is not None:
        prefix = mask.prefix[:, None, None]
        any_visible |= k_first < prefix
        all_visible |= k_last < prefix
    return any_visible, all_visible


def _same_segment(
    mask: AttentionMask, queries: int, keys: int, blocks: BlockSizes
) -> tuple[Bool[Array, "B outer inner"], Bool[Array, "B outer inner"]]:
    q_least, q_greatest = _query_extremes(mask.q_segments, queries, blocks)
    k_least, k_greatest = _key_extremes(mask.kv_segments, keys, blocks)

    # Segments [2, 3] and [3, 5] overlap, both ends included; segment 0 is padding.
    any_same = q_greatest >= k_least
    any_same &= q_least <= k_greatest
    any_same &= q_greatest > 0
    any_same &= k_greatest > 0

    all_same = q_least == q_greatest
    all_same &= k_least == k_greatest
    all_same &= q_least == k_least
    return any_same, all_same


def plan_tiles(
    any_visible: Bool[Array, "B outer inner"],
    all_visible: Bool[Array, "B outer inner"],
    tiles_per_chunk: int,
) -> TilePlan:
    """Returns the inner tiles that each outer block visits.

    Args:
      any_visible, all_visible: of `tile_visibility`, with the outer blocks first.
      tiles_per_chunk: inner tiles that are in VMEM together.
    """
    rows, outer, inner = any_visible.shape
    padding = -inner % tiles_per_chunk
    widths = ((0, 0), (0, 0), (0, padding))

    # [rows, outer, inner] -> [rows, outer, chunks, tiles]
    in_chunks = (rows, outer, -1, tiles_per_chunk)
    any_visible = jnp.pad(any_visible, widths)
    any_visible = any_visible.reshape(in_chunks)
    all_visible = jnp.pad(all_visible, widths)
    all_visible = all_visible.reshape(in_chunks)

    # 0 needs no mask, 1 needs it, 2 is skipped: priority [1, 0, 2, 0] -> order [1, 3, 0, 2]
    priority = jnp.where(any_visible, 1, 2)
    priority = jnp.where(all_visible, 0, priority)
    order = jnp.argsort(priority, axis=-1, stable=True)
    order = order.astype(jnp.int32).reshape(-1)

    # The same tiles -> counts [2, 3]
    unmasked = all_visible.sum(-1)
    visited = any_visible.sum(-1)
    counts = jnp.stack([unmasked, visited], axis=-1)
    counts = counts.astype(jnp.int32).reshape(-1)
    return TilePlan(order, counts, rows)


def flat_index(indices: Sequence[Any], sizes: Sequence[int]) -> Any:
    """Returns the index into a flattened array: indices (1, 2) of sizes (5, 3) -> 5.

    Args:
      indices: along each axis, the outermost first.
      sizes: of the axes; a first axis of size 1 is broadcast, whatever its index.
    """
    flat, *others = indices
    if sizes[0] == 1:
        flat = 0
    for index, size in zip(others, sizes[1:], strict=True):
        flat = flat * size + index
    return flat


@dataclasses.dataclass(frozen=True)
class Visits:
    """The tiles that one step of a kernel's grid visits, as a plan in SMEM lists them.

    Attributes:
      counts_ref, order_ref: the plan.
      entry: index of the step in the plan: of its batch row, outer block and chunk.
      tiles_per_chunk: of the plan.
      block: tokens of an inner tile.
    """

    counts_ref: Any
    order_ref: Any
    entry: Any
    tiles_per_chunk: int
    block: int

    def counts(self) -> tuple[Any, Any]:
        """Returns how many tiles need no mask, and how many are visited at all."""
        # [unmasked, visited] of entry 3 are elements 6 and 7.
        pair = 2 * self.entry
        unmasked = self.counts_ref[pair]
        visited = self.counts_ref[pair + 1]
        return unmasked, visited

    def offset(self, visit: Any) -> Any:
        """Returns at which token of the chunk the tile of a visit starts."""
        first = self.entry * self.tiles_per_chunk
        tile = self.order_ref[first + visit]
        return pl.multiple_of(tile * self.block, self.block)


def visit_tiles(
    first: Any, unmasked: Any, visited: Any, add_tile: Callable[[Any, bool], None]
) -> None:
    """Adds tiles in the order of the plan: those that need no mask, then the others.

    Args:
      first: the visit to begin with.
      unmasked, visited: of `Visits.counts`.
      add_tile: takes a visit, and whether the tile is masked.
    """

    def add_unmasked(visit: Any, _: None) -> None:
        add_tile(visit, False)

    def add_masked(visit: Any, _: None) -> None:
        add_tile(visit, True)

    # Of 7 tiles, 5 of which need no mask: visits 0:5, then 5:7 with the mask.
    jax.lax.fori_loop(first, unmasked, add_unmasked, None)
    jax.lax.fori_loop(unmasked, visited, add_masked, None)

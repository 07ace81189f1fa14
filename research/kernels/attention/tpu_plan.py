"""Which tiles of scores a TPU kernel computes, and which of them need the mask looked at."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from research.kernels.attention.mask import AttentionMask


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes in tokens; keys are multiples of 128.

    Attributes:
      queries: rows of a tile.
      keys: columns of a tile.
      resident: keys (forward) or queries (backward) that stay in fast memory together, a multiple
          of both.
      down: whether keys are the rows of a forward tile and queries its columns, and not the other
          way round.
    """

    queries: int = 512
    keys: int = 512
    resident: int = 16384
    down: bool = False


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles that each block of an outer axis visits, those that need no mask first.

    Attributes:
      order: per batch row (1 where all are alike), outer block and resident chunk, the tiles within
        the chunk, as one vector.
      counts: how many of them need no mask, and how many are visited at all, as one vector of
          pairs.
      rows: batch rows told apart.
    """

    order: Int[Array, " tiles"]
    counts: Int[Array, " pairs"]
    rows: int


def cover(size: int, block: int) -> int:
    """Returns how many blocks cover `size`."""
    return -(-size // block)


def _extremes(
    values: Int[Array, "B L"], block: int, low: int, high: int
) -> tuple[Int[Array, "B n"], Int[Array, "B n"]]:
    """Returns the least and the greatest value of each block; a short last block counts what it
    has.
    """
    pad = -values.shape[1] % block
    least = (
        jnp.pad(values, ((0, 0), (0, pad)), constant_values=high)
        .reshape(values.shape[0], -1, block)
        .min(-1)
    )
    most = (
        jnp.pad(values, ((0, 0), (0, pad)), constant_values=low)
        .reshape(values.shape[0], -1, block)
        .max(-1)
    )
    return least, most


def visibility(
    mask: AttentionMask, queries: int, keys: int, blocks: Blocks
) -> tuple[Bool[Array, "B q k"], Bool[Array, "B q k"]]:
    """Returns which tiles may hold something visible, and which are visible throughout; B is 1
    where rows are alike.
    """
    limits = jnp.iinfo(jnp.int32)

    def blockwise(given: Int[Array, "B L"] | None, length: int, block: int) -> tuple[Array, Array]:
        values = jnp.arange(length, dtype=jnp.int32)[None] if given is None else given
        return _extremes(values, block, limits.min // 2, limits.max // 2)

    q_least, q_most = (x[:, :, None] for x in blockwise(mask.q_positions, queries, blocks.queries))
    k_least, k_most = (x[:, None, :] for x in blockwise(mask.kv_positions, keys, blocks.keys))
    some = jnp.ones((1, cover(queries, blocks.queries), cover(keys, blocks.keys)), bool)
    every = some
    if mask.causal:
        some, every = some & (q_most >= k_least), every & (q_least >= k_most)
    if mask.window is not None:
        some = some & (q_least - k_most < mask.window) & (k_least - q_most < mask.window)
        every = every & (q_most - k_least < mask.window) & (k_most - q_least < mask.window)
    if mask.prefix is not None:
        prefix = mask.prefix[:, None, None]
        some, every = some | (k_least < prefix), every | (k_most < prefix)
    if mask.q_segments is not None:
        q_least, q_most = (
            x[:, :, None] for x in blockwise(mask.q_segments, queries, blocks.queries)
        )
        k_least, k_most = (x[:, None, :] for x in blockwise(mask.kv_segments, keys, blocks.keys))
        some = some & (q_most >= k_least) & (q_least <= k_most) & (q_most > 0) & (k_most > 0)
        every = every & (q_least == q_most) & (k_least == k_most) & (q_least == k_least)
    if keys % blocks.keys:
        every = every & (jnp.arange(every.shape[2]) < every.shape[2] - 1)[None, None]
    if queries % blocks.queries:
        every = every & (jnp.arange(every.shape[1]) < every.shape[1] - 1)[None, :, None]
    return some, every & some


def plan(
    some: Bool[Array, "B outer inner"], every: Bool[Array, "B outer inner"], chunk: int
) -> Tiles:
    """Returns the inner tiles that each outer block visits, in chunks of `chunk` tiles."""
    rows, outer, inner = some.shape
    pad = ((0, 0), (0, 0), (0, -inner % chunk))
    some, every = (jnp.pad(x, pad).reshape(rows, outer, -1, chunk) for x in (some, every))
    order = jnp.argsort(jnp.where(every, 0, jnp.where(some, 1, 2)), axis=-1, stable=True)
    counts = jnp.stack([every.sum(-1), some.sum(-1)], axis=-1)
    return Tiles(order.astype(jnp.int32).reshape(-1), counts.astype(jnp.int32).reshape(-1), rows)

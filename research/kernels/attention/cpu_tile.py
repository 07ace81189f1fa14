"""Tiles of scores of the CPU attention: which queries and keys each has, and their scores.

Arrays of this module have heads first: queries are `[BK, G, T, H]`, keys and values `[BK, S, H]`,
where BK counts the pairs of a sequence and a key/value head. One tile holds a few consecutive
queries of all G heads of a group, stacked to GT rows, so that each of the BK matmuls
`[GT, H] x [H, S]` reads its keys once for the whole group. S are the keys that the tile can reach.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask, Span
from research.kernels.attention.terms import ScoreTerms

# Queries per tile.
TILE = 128
# The queries are cut into ceil(T / band size) bands, which are at most this many (see `bands`). The
# last may be yielded as two, its whole tiles and a shorter tile, so a call may fold one band more.
TARGET_BANDS = 8
# The score of a hidden key: finite, so that sums stay finite. exp(HIDDEN - m) is 0 for every row
# maximum m >= HIDDEN / 2; the forward pass clamps m to that.
HIDDEN = -1e30


@dataclasses.dataclass(frozen=True)
class Tile:
    """Some queries of every head against the keys that they can reach.

    Attributes:
      batch: the number of sequences, B.
      queries: the queries; where they start is traced inside of a loop.
      keys: the keys, static.
    """

    batch: int
    queries: Span
    keys: Span

    def query_rows(self, x: Float[Array, "BK G length _"]) -> Float[Array, "BK GT _"]:
        """Returns the tile's queries, those of a group's heads stacked."""
        start, size = self.queries
        bk, group, _, width = x.shape
        rows = lax.dynamic_slice_in_dim(x, start, size, axis=2)
        # [BK, G, 128, H] -> [BK, G * 128, H]
        return rows.reshape(bk, group * size, width)

    def unstack_rows(self, rows: Float[Array, "BK GT _"]) -> Float[Array, "BK G T _"]:
        """Returns rows by head again: the inverse of `query_rows`."""
        bk, _, width = rows.shape
        # [BK, G * 128, H] -> [BK, G, 128, H]
        return rows.reshape(bk, -1, self.queries.size, width)

    def reached_keys(self, x: Float[Array, "BK length H"]) -> Float[Array, "BK S H"]:
        """Returns the keys, or values, that the tile can reach."""
        start, size = self.keys
        return x[:, start : start + size]


# carry, tile -> carry, outputs of the tile, each [BK, G, T, _].
Step = Callable[[Any, Tile], tuple[Any, tuple[Array, ...]]]


@dataclasses.dataclass(frozen=True)
class Band:
    """Tiles that follow each other and share the keys that any of them can reach.

    Attributes:
      batch: the number of sequences, B.
      start: the first query.
      tile_size: queries of each tile.
      num_tiles: how many tiles.
      keys: the keys that the band can reach.
    """

    batch: int
    start: int
    tile_size: int
    num_tiles: int
    keys: Span

    def fold(self, step: Step, carry: Any) -> tuple[Any, tuple[Array, ...]]:
        """Folds `step` over the tiles; their outputs are joined along the queries."""

        def visit(carry: Any, start: Any) -> tuple[Any, tuple[Array, ...]]:
            queries = Span(start, self.tile_size)
            tile = Tile(self.batch, queries, self.keys)
            return step(carry, tile)

        if self.num_tiles == 1:
            return visit(carry, self.start)

        starts = self.start + self.tile_size * jnp.arange(self.num_tiles)
        carry, outputs = lax.scan(visit, carry, starts)
        return carry, tuple(map(_join_tiles, outputs))


def _join_tiles(x: Float[Array, "tiles BK G T _"]) -> Float[Array, "BK G tiles*T _"]:
    tiles, bk, group, size, width = x.shape
    # [3, BK, G, 128, H] -> [BK, G, 3, 128, H] -> [BK, G, 384, H]
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(bk, group, tiles * size, width)


def bands(mask: AttentionMask, batch: int, num_queries: int, num_keys: int) -> Iterator[Band]:
    """Yields the bands that hold all queries, in order.

    Args:
      mask: says which keys a band can reach.
      batch: B.
      num_queries: T.
      num_keys: S.
    """
    # 300 queries -> bands of 128, 128 and 44 queries, one tile each.
    # 2,100 queries -> bands of 384 queries, three tiles each; the last 180 are a band of one tile
    # and one of the 52 queries that fill no tile.
    band_size = TILE * math.ceil(num_queries / (TILE * TARGET_BANDS))

    for start in range(0, num_queries, band_size):
        stop = min(start + band_size, num_queries)
        num_tiles = (stop - start) // TILE
        rest_start = start + num_tiles * TILE
        if num_tiles:
            yield Band(
                batch,
                start,
                tile_size=TILE,
                num_tiles=num_tiles,
                keys=_reach(mask, start, rest_start, num_keys),
            )
        if rest_start < stop:
            yield Band(
                batch,
                rest_start,
                tile_size=stop - rest_start,
                num_tiles=1,
                keys=_reach(mask, rest_start, stop, num_keys),
            )


def _reach(mask: AttentionMask, start: int, stop: int, num_keys: int) -> Span:
    reach = mask.reach(start, stop, num_keys)
    size = reach.stop - reach.start
    return Span(reach.start, size)


def matmul(
    a: Float[Array, "BK rows inner"], b: Float[Array, "BK _ _"], *, transpose_b: bool = False
) -> Float[Array, "BK rows columns"]:
    """Returns a b or a bᵀ, in float32."""
    batch = ((0,), (0,))
    contracted = ((2,), (1,))
    if transpose_b:
        contracted = ((2,), (2,))
    return lax.dot_general(
        a, b, dimension_numbers=(contracted, batch), preferred_element_type=jnp.float32
    )


def tile_scores(
    q_GTxH: Float[Array, "BK GT H"],
    k_SxH: Float[Array, "BK S H"],
    mask: AttentionMask,
    terms: ScoreTerms,
    tile: Tile,
) -> tuple[Float[Array, "BK GT S"], Float[Array, "BK GT S"] | None]:
    """Returns the scores of a tile, `HIDDEN` where the mask says so, and the derivative of the cap.

    The derivative is None where there is no cap.
    """
    scores = terms.scale * matmul(q_GTxH, k_SxH, transpose_b=True)
    stacked_shape = scores.shape

    cap_derivative = None
    if terms.softcap is not None:
        bounded = jnp.tanh(scores / terms.softcap)
        scores = terms.softcap * bounded
        cap_derivative = 1 - jnp.square(bounded)

    # [BK, GT, S] -> [B, K, G, T, S]: the mask differs by sequence and token, the terms by head.
    kv_heads = k_SxH.shape[0] // tile.batch
    scores = scores.reshape(tile.batch, kv_heads, -1, tile.queries.size, tile.keys.size)
    if terms.bias is not None:
        scores += _tile_bias(terms.bias, kv_heads, tile)
    if terms.alibi is not None:
        # [N] -> [1, K, G, 1, 1]
        slopes = terms.alibi.astype(jnp.float32)
        slopes = slopes.reshape(1, kv_heads, -1, 1, 1)
        # [B, 1, T, S] -> [B, 1, 1, T, S]
        distance = mask.distance(tile.queries, tile.keys)
        scores -= slopes * distance[:, :, None]

    # [B, 1, T, S] -> [B, 1, 1, T, S]
    visible = mask.block(tile.queries, tile.keys)
    scores = jnp.where(visible[:, :, None], scores, HIDDEN)
    return scores.reshape(stacked_shape), cap_derivative


def _tile_bias(
    bias: Float[Array, "#B #N queries keys"], kv_heads: int, tile: Tile
) -> Float[Array, "#B #K #G #T #S"]:
    start, shape = bias_block(bias, tile)
    block = lax.dynamic_slice(bias, start, shape)

    # [B, N, T, S] -> [B, K, G, T, S]; [B, 1, T, S] -> [B, 1, 1, T, S]
    batch, heads, num_queries, num_keys = shape
    if heads == 1:
        kv_heads = 1
    return block.reshape(batch, kv_heads, heads // kv_heads, num_queries, num_keys)


def bias_block(
    bias: Float[Array, "#B #N #T #S"], tile: Tile
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Returns where the bias of a tile starts and its shape, for a dynamic slice.

    An axis of size 1 is broadcast, and taken whole: a bias `[B, N, 1, S]` of queries 128:256 and
    keys 0:256 starts at `(0, 0, 0, 0)` and has the shape `(B, N, 1, 256)`.
    """
    batch, heads, num_queries, num_keys = bias.shape
    rows = tile.queries if num_queries > 1 else Span(0, 1)
    columns = tile.keys if num_keys > 1 else Span(0, 1)
    start = (0, 0, rows.start, columns.start)
    shape = (batch, heads, rows.size, columns.size)
    return start, shape


def sink_rows(terms: ScoreTerms, kv_heads: int, tile: Tile) -> Float[Array, "1 K GT 1"]:
    """Returns the logit of the sink of each row of a tile."""
    # [N] -> [1, K, G, 1] -> [1, K, G * 128, 1]
    sinks = terms.sinks.astype(jnp.float32)
    sinks = sinks.reshape(1, kv_heads, -1, 1)
    return jnp.repeat(sinks, tile.queries.size, axis=2)

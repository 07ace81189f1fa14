"""The forward pass of the CPU attention over one shard: a softmax of whole rows, tile by tile."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from research.kernels.attention.cpu_tile import HIDDEN, Tile, bands, matmul, sink_rows, tile_scores
from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms


def forward(
    q: Float[Array, "BK G T H"],
    k: Float[Array, "BK S H"],
    v: Float[Array, "BK S H"],
    batch: int,
    mask: AttentionMask,
    terms: ScoreTerms,
) -> tuple[Float[Array, "BK G T H"], Float[Array, "BK G T 1"]]:
    """Returns the result and lse, the logsumexp of each row of scores, sink included.

    lse is +inf where a query attends to no key.

    Args:
      q, k, v: heads first; see `cpu_tile`.
      batch: B.
      mask: of these sequences.
      terms: of these sequences and heads.
    """
    num_queries = q.shape[2]
    num_keys = k.shape[1]

    def step(carry: None, tile: Tile) -> tuple[None, tuple[Array, Array]]:
        rows = _tile_softmax(
            tile.query_rows(q), tile.reached_keys(k), tile.reached_keys(v), mask, terms, tile
        )
        return carry, tuple(map(tile.unstack_rows, rows))

    outs = []
    lses = []
    for band in bands(mask, batch, num_queries, num_keys):
        _, (out, lse) = band.fold(step, None)
        outs.append(out)
        lses.append(lse)

    # [BK, G, T of a band, H] -> [BK, G, T, H]
    out = jnp.concatenate(outs, axis=2)
    lse = jnp.concatenate(lses, axis=2)
    return out, lse


def _tile_softmax(
    q_GTxH: Float[Array, "BK GT H"],
    k_SxH: Float[Array, "BK S H"],
    v_SxH: Float[Array, "BK S H"],
    mask: AttentionMask,
    terms: ScoreTerms,
    tile: Tile,
) -> tuple[Float[Array, "BK GT H"], Float[Array, "BK GT 1"]]:
    """Returns the result of a tile and the logsumexp of each of its rows of scores."""
    scores_GTxS, _ = tile_scores(q_GTxH, k_SxH, mask, terms, tile)

    # The row maximum, at least HIDDEN / 2: in a row of hidden keys alone exp(HIDDEN - top) is then
    # 0, not 1.
    top = jnp.max(scores_GTxS, axis=-1, keepdims=True, initial=HIDDEN / 2)
    exp_GTxS = jnp.exp(scores_GTxS - top).astype(v_SxH.dtype)
    # The barrier keeps the sum from computing the exponential a second time.
    exp_GTxS = lax.optimization_barrier(exp_GTxS)
    total = jnp.sum(exp_GTxS, axis=-1, keepdims=True, dtype=jnp.float32)
    any_visible = total > 0
    if terms.sinks is not None:
        total += _exp_of_sinks(top, terms, tile)

    # [GT, S] x [S, H] / [GT, 1]: dividing the product takes H divisions per row and not S.
    divisor = jnp.where(any_visible, total, 1.0)
    out = matmul(exp_GTxS, v_SxH) / divisor
    lse = top + jnp.log(total)
    lse = jnp.where(any_visible, lse, jnp.inf)
    return out.astype(v_SxH.dtype), lse


def _exp_of_sinks(
    top: Float[Array, "BK GT 1"], terms: ScoreTerms, tile: Tile
) -> Float[Array, "BK GT 1"]:
    """Returns exp(sink - top) of each row: what the sink adds to the denominator."""
    kv_heads = top.shape[0] // tile.batch
    sinks = sink_rows(terms, kv_heads, tile)
    # [BK, GT, 1] -> [B, K, GT, 1]
    top_by_head = top.reshape(tile.batch, *sinks.shape[1:])
    exp_sinks = jnp.exp(sinks - top_by_head)
    return exp_sinks.reshape(top.shape)

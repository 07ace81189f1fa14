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
    """Returns the result and the log of the denominator, infinite where a query attends to no key.

    Args:
      q, k, v: heads first; see `cpu_tile`.
      batch: B.
      mask: of these sequences.
      terms: of these sequences and heads.
    """
    queries = q.shape[2]
    keys = k.shape[1]

    def step(carry: None, tile: Tile) -> tuple[None, tuple[Array, Array]]:
        rows = _tile_softmax(
            tile.query_rows(q), tile.reached_keys(k), tile.reached_keys(v), mask, terms, tile
        )
        return carry, tuple(map(tile.unstack_rows, rows))

    outs = []
    log_totals = []
    for band in bands(mask, batch, queries, keys):
        _, (out, log_total) = band.fold(step, None)
        outs.append(out)
        log_totals.append(log_total)

    # [BK, G, T of a band, H] -> [BK, G, T, H]
    out = jnp.concatenate(outs, axis=2)
    log_total = jnp.concatenate(log_totals, axis=2)
    return out, log_total


def _tile_softmax(
    q_GTxH: Float[Array, "BK GT H"],
    k_SxH: Float[Array, "BK S H"],
    v_SxH: Float[Array, "BK S H"],
    mask: AttentionMask,
    terms: ScoreTerms,
    tile: Tile,
) -> tuple[Float[Array, "BK GT H"], Float[Array, "BK GT 1"]]:
    """Returns the result of a tile and the log of its denominators."""
    scores_GTxS, _ = tile_scores(q_GTxH, k_SxH, mask, terms, tile)

    # Half of HIDDEN at least: where all keys of a row are hidden, exp(HIDDEN - top) is 0.
    top = jnp.max(scores_GTxS, axis=-1, keepdims=True, initial=HIDDEN / 2)
    exp_GTxS = jnp.exp(scores_GTxS - top).astype(v_SxH.dtype)
    # The barrier keeps the sum from computing the exponential a second time.
    exp_GTxS = lax.optimization_barrier(exp_GTxS)
    total = jnp.sum(exp_GTxS, axis=-1, keepdims=True, dtype=jnp.float32)
    any_visible = total > 0
    if terms.sinks is not None:
        total += _exp_of_sinks(top, terms, tile)

    # [GT, S] x [S, H] / [GT, 1]: dividing the product takes H divisions a row and not S.
    divisor = jnp.where(any_visible, total, 1.0)
    out = matmul(exp_GTxS, v_SxH) / divisor
    log_total = top + jnp.log(total)
    log_total = jnp.where(any_visible, log_total, jnp.inf)
    return out.astype(v_SxH.dtype), log_total


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

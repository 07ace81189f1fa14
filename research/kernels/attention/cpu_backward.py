"""The backward pass of the CPU attention over one shard.

The scores of a tile are recomputed; with the logsumexp of their row, which the forward pass saved,
they give the softmax weights.

Source: Dao 2023 (FlashAttention-2), arXiv:2307.08691, algorithm 2, with whole rows of scores.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from research.kernels.attention.cpu_tile import (
    Tile,
    bands,
    bias_block,
    matmul,
    sink_rows,
    tile_scores,
)
from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.kernels.row_major import swap_last


class Saved(NamedTuple):
    """What the forward pass of a shard saves; heads first, see `cpu_tile`.

    Attributes:
      q, k, v: the operands.
      out: the result.
      lse: logsumexp of each row of scores, sink included; +inf where a query attends to no key.
    """

    q: Float[Array, "BK G T H"]
    k: Float[Array, "BK S H"]
    v: Float[Array, "BK S H"]
    out: Float[Array, "BK G T H"]
    lse: Float[Array, "BK G T 1"]


class _Sums(NamedTuple):
    """Gradients that are summed over tiles, in float32.

    Those of keys and values are transposed: the small operand of their matmuls is then on the left.
    """

    dk: Float[Array, "BK H S"]
    dv: Float[Array, "BK H S"]
    terms: ScoreTerms


def backward(
    saved: Saved, g: Float[Array, "BK G T H"], batch: int, mask: AttentionMask, terms: ScoreTerms
) -> tuple[Float[Array, "BK G T H"], Float[Array, "BK S H"], Float[Array, "BK S H"], ScoreTerms]:
    """Returns the gradients of q, k and v, heads first, and those of the terms in float32.

    Args:
      saved: of the forward pass.
      g: the gradient of its result.
      batch: B.
      mask: of these sequences.
      terms: of these sequences and heads.
    """
    num_queries = saved.q.shape[2]
    bk, num_keys, width = saved.k.shape
    dtype = saved.k.dtype

    def step(sums: _Sums, tile: Tile) -> tuple[_Sums, tuple[Array]]:
        sums, dq = _tile_gradients(sums, saved, g, mask, terms, tile)
        return sums, (dq,)

    dk = jnp.zeros((bk, width, num_keys), jnp.float32)
    dv = jnp.zeros((bk, width, num_keys), jnp.float32)
    dterms = zero_gradients(terms)
    dqs = []
    for band in bands(mask, batch, num_queries, num_keys):
        # Only the keys that the band reaches are carried through its loop.
        start, size = band.keys
        reached = slice(start, start + size)
        sums = _Sums(dk[:, :, reached], dv[:, :, reached], dterms)
        sums, (dq,) = band.fold(step, sums)

        dk = dk.at[:, :, reached].set(sums.dk)
        dv = dv.at[:, :, reached].set(sums.dv)
        dterms = sums.terms
        dqs.append(dq)

    # [BK, G, T of a band, H] -> [BK, G, T, H]
    dq = jnp.concatenate(dqs, axis=2)
    # [BK, H, S] -> [BK, S, H]
    dk = jnp.swapaxes(dk.astype(dtype), 1, 2)
    dv = jnp.swapaxes(dv.astype(dtype), 1, 2)
    return dq, dk, dv, dterms


def zero_gradients(terms: ScoreTerms) -> ScoreTerms:
    """Returns float32 zeros in the shape of the terms: gradients that nothing was added to."""

    def zeros(term: Array) -> Array:
        return jnp.zeros(term.shape, jnp.float32)

    return jax.tree.map(zeros, terms)


def _tile_gradients(
    sums: _Sums,
    saved: Saved,
    g: Float[Array, "BK G T H"],
    mask: AttentionMask,
    terms: ScoreTerms,
    tile: Tile,
) -> tuple[_Sums, Float[Array, "BK G _ H"]]:
    """Adds the gradients of one tile to the sums; returns them and the gradient of its queries."""
    dtype = saved.k.dtype
    q_GTxH = tile.query_rows(saved.q)
    g_GTxH = tile.query_rows(g)
    k_SxH = tile.reached_keys(saved.k)
    v_SxH = tile.reached_keys(saved.v)

    # Softmax weights: exp(score) / Σ exp = exp(score - lse).
    scores_GTxS, cap_derivative = tile_scores(q_GTxH, k_SxH, mask, terms, tile)
    lse = tile.query_rows(saved.lse)
    weights_GTxS = jnp.exp(scores_GTxS - lse)

    # Through the softmax: ds = w (dw - delta), with delta = Σ_s w dw = g · out.
    dweights_GTxS = matmul(g_GTxH, v_SxH, transpose_b=True)
    out_GTxH = tile.query_rows(saved.out)
    g_out_GTxH = g_GTxH.astype(jnp.float32) * out_GTxH.astype(jnp.float32)
    delta = jnp.sum(g_out_GTxH, axis=-1, keepdims=True)
    dscores_GTxS = weights_GTxS * (dweights_GTxS - delta)
    dterms = _add_term_gradients(sums.terms, terms, dscores_GTxS, delta, lse, tile)

    # Through the cap and the scale, to q kᵀ.
    if cap_derivative is not None:
        dscores_GTxS = cap_derivative * dscores_GTxS
    dproduct_GTxS = (terms.scale * dscores_GTxS).astype(dtype)
    weights_GTxS = weights_GTxS.astype(dtype)
    # The barrier keeps each matmul from computing its operand again.
    operands = (weights_GTxS, dproduct_GTxS)
    weights_GTxS, dproduct_GTxS = lax.optimization_barrier(operands)

    dq_GTxH = matmul(dproduct_GTxS, k_SxH)
    dq = tile.unstack_rows(dq_GTxH).astype(dtype)
    # [H, GT] x [GT, S]
    dk = sums.dk + matmul(swap_last(q_GTxH), dproduct_GTxS)
    dv = sums.dv + matmul(swap_last(g_GTxH), weights_GTxS)
    return _Sums(dk, dv, dterms), dq


def _add_term_gradients(
    sums: ScoreTerms,
    terms: ScoreTerms,
    dscores: Float[Array, "BK GT S"],
    delta: Float[Array, "BK GT 1"],
    lse: Float[Array, "BK GT 1"],
    tile: Tile,
) -> ScoreTerms:
    """Returns `sums`, the gradients of the terms, with those of a tile added."""
    dbias = sums.bias
    if dbias is not None:
        dbias = _add_bias_gradient(dbias, dscores, tile)

    dsinks = sums.sinks
    if dsinks is not None:
        dsinks = _add_sink_gradient(dsinks, terms, delta, lse, tile)
    return dataclasses.replace(sums, bias=dbias, sinks=dsinks)


def _add_bias_gradient(
    dbias: Float[Array, "#B #N #T #S"], dscores: Float[Array, "BK GT reached"], tile: Tile
) -> Float[Array, "#B #N #T #S"]:
    start, shape = bias_block(dbias, tile)
    # [BK, GT, S] -> [B, N, T, S]
    num_queries = tile.queries.size
    num_keys = tile.keys.size
    block = dscores.reshape(tile.batch, -1, num_queries, num_keys)

    # Summed over the axes that the bias broadcasts: [B, N, T, S] -> [B, N, 1, S]
    broadcast = [axis for axis, size in enumerate(shape) if size == 1]
    block = block.sum(axis=tuple(broadcast), keepdims=True)

    block += lax.dynamic_slice(dbias, start, shape)
    return lax.dynamic_update_slice(dbias, block, start)


def _add_sink_gradient(
    dsinks: Float[Array, "N"],
    terms: ScoreTerms,
    delta: Float[Array, "BK GT 1"],
    lse: Float[Array, "BK GT 1"],
    tile: Tile,
) -> Float[Array, "N"]:
    """Adds -Σ delta exp(sink - lse): a sink has a weight, and a value of zero."""
    kv_heads = delta.shape[0] // tile.batch
    sinks = sink_rows(terms, kv_heads, tile)
    # [BK, GT, 1] -> [B, K, GT, 1]
    lse = lse.reshape(tile.batch, *sinks.shape[1:])
    sink_weights = jnp.exp(sinks - lse)
    gradients = delta * sink_weights.reshape(delta.shape)

    # [BK, GT, 1] -> [B, N, T] -> [N]
    num_queries = tile.queries.size
    gradients = gradients.reshape(tile.batch, -1, num_queries)
    return dsinks - gradients.sum(axis=(0, 2))

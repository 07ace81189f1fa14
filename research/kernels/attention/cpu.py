"""Attention for CPU: tiles of queries against the keys that they can reach, with a gradient of its own.

What makes it fast: batched matmuls over `[B·K]` that the matmul library takes as they are (no operand transposed on the
left), the division by the softmax's denominator after the matmul with the values, blocks above the diagonal never
computed, and only the log of the denominator kept for the backward pass.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.kernels.row_major import swap_last

MIN_TILE = 128
MAX_TILES = 16
# exp gives 0 for it whatever is subtracted, and sums with it stay finite.
HIDDEN = -1e30


def _tiles(mask: AttentionMask, queries: int, keys: int) -> Iterator[tuple[slice, slice]]:
    """Yields slices of queries, each with the keys that it can reach."""
    size = max(MIN_TILE, math.ceil(queries / MAX_TILES))
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        yield slice(start, stop), mask.reach(start, stop, keys)


def _split_heads(x: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "BK G T H"]:
    batch, length, heads, width = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(batch * kv_heads, heads // kv_heads, length, width)


def _merge_heads(x: Float[Array, "BK G T H"], batch: int) -> Float[Array, "B T N H"]:
    return jnp.swapaxes(x.reshape(batch, -1, *x.shape[-2:]), 1, 2)


def _matmul(
    a: Float[Array, "BK M C"], b: Float[Array, "BK _ _"], *, transpose_b: bool = False
) -> Float[Array, "BK M P"]:
    """Returns a b or a bᵀ, in float32."""
    numbers = (((2,), (2 if transpose_b else 1,)), ((0,), (0,)))
    return jax.lax.dot_general(a, b, numbers, preferred_element_type=jnp.float32)


def _rows(x: Float[Array, "BK G T H"], tile: slice) -> Float[Array, "BK R H"]:
    """Returns the queries of a tile, those of a group's heads under each other."""
    return x[:, :, tile].reshape(x.shape[0], -1, x.shape[-1])


def _scores(
    q: Float[Array, "BK R H"],
    k: Float[Array, "BK S H"],
    batch: int,
    mask: AttentionMask,
    terms: ScoreTerms,
    tile: slice,
    reach: slice,
) -> tuple[Float[Array, "BK R C"], Float[Array, "BK R C"] | None]:
    """Returns the scores of a tile and the slope of the cap."""
    scores, slope = terms.scale * _matmul(q, k[:, reach], transpose_b=True), None
    flat, kv_heads, rows = scores.shape, k.shape[0] // batch, tile.stop - tile.start
    if terms.softcap is not None:
        bounded = jnp.tanh(scores / terms.softcap)
        scores, slope = terms.softcap * bounded, 1 - jnp.square(bounded)
    scores = scores.reshape(batch, kv_heads, -1, rows, flat[2])
    if terms.bias is not None:
        part = terms.bias[_part_of_bias(terms.bias, tile, reach)]
        heads = (kv_heads, -1) if part.shape[1] > 1 else (1, 1)
        scores += part.reshape(part.shape[0], *heads, *part.shape[2:])
    if terms.alibi is not None:
        slopes = terms.alibi.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)
        scores -= slopes * mask.distance(tile, reach)[:, :, None]
    return jnp.where(mask.block(tile, reach)[:, :, None], scores, HIDDEN).reshape(flat), slope


def _part_of_bias(bias: Float[Array, "#B #N #T #S"], tile: slice, reach: slice) -> tuple[slice, ...]:
    """Returns where the bias of a tile stands: an axis that is broadcast is whole."""
    whole = slice(None)
    return whole, whole, tile if bias.shape[2] > 1 else whole, reach if bias.shape[3] > 1 else whole


def _sinks(terms: ScoreTerms, kv_heads: int, rows: int) -> Float[Array, "1 K R 1"]:
    """Returns the sink of each row of a tile."""
    sinks = terms.sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1)
    return jnp.repeat(sinks, rows, axis=2)


def _forward(
    q: Float[Array, "BK G T H"],
    k: Float[Array, "BK S H"],
    v: Float[Array, "BK S H"],
    batch: int,
    mask: AttentionMask,
    terms: ScoreTerms,
) -> tuple[Float[Array, "BK G T H"], Float[Array, "BK G T 1"]]:
    """Returns the result and the log of the denominator, infinite where a query sees nothing."""
    outs, log_totals = [], []
    for tile, reach in _tiles(mask, q.shape[2], k.shape[1]):
        scores, _ = _scores(_rows(q, tile), k, batch, mask, terms, tile, reach)
        top = jnp.max(scores, axis=-1, keepdims=True, initial=HIDDEN / 2)
        # The barrier keeps the sum from computing the exponential a second time.
        weights = jax.lax.optimization_barrier(jnp.exp(scores - top).astype(v.dtype))
        total = jnp.sum(weights, axis=-1, keepdims=True, dtype=jnp.float32)
        seen = total > 0
        if terms.sinks is not None:
            sinks = _sinks(terms, k.shape[0] // batch, tile.stop - tile.start)
            total += jnp.exp(sinks - top.reshape(batch, *sinks.shape[1:])).reshape(total.shape)
        out = _matmul(weights, v[:, reach]) / jnp.where(seen, total, 1.0)
        log_total = jnp.where(seen, top + jnp.log(total), jnp.inf)
        outs.append(out.astype(v.dtype).reshape(*q.shape[:2], -1, q.shape[3]))
        log_totals.append(log_total.reshape(*q.shape[:2], -1, 1))
    return jnp.concatenate(outs, axis=2), jnp.concatenate(log_totals, axis=2)


def refusal(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], mask: AttentionMask, terms: ScoreTerms) -> None:
    """Takes everything."""


@jax.custom_vjp
def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> Float[Array, "B T N H"]:
    """Attention by tiles of queries; see the face of the package for the equation.

    Source: the backward pass is Dao 2023 (FlashAttention-2), arXiv:2307.08691, algorithm 2, with whole rows of scores.
    """
    return _attention_fwd(q, k, v, mask, terms)[0]


def _attention_fwd(q: Array, k: Array, v: Array, mask: AttentionMask, terms: ScoreTerms) -> tuple[Array, tuple]:
    batch, kv_heads = k.shape[0], k.shape[2]
    q, k, v = (_split_heads(x, kv_heads) for x in (q, k, v))
    k, v = k[:, 0], v[:, 0]
    out, log_total = _forward(q, k, v, batch, mask, terms)
    return _merge_heads(out, batch), (q, k, v, mask, terms, out, log_total)


def _attention_bwd(saved: tuple, g: Float[Array, "B T N H"]) -> tuple:
    q, k, v, mask, terms, out, log_total = saved
    batch, (groups, queries) = g.shape[0], q.shape[1:3]
    g = _split_heads(g, k.shape[0] // batch)
    delta = jnp.sum(g.astype(jnp.float32) * out, axis=-1, keepdims=True)
    dqs = []
    # Transposed, so that the small operand of the matmul is the one on the left.
    dk, dv = (jnp.zeros((x.shape[0], x.shape[2], x.shape[1]), jnp.float32) for x in (k, v))
    dbias = None if terms.bias is None else jnp.zeros(terms.bias.shape, jnp.float32)
    for tile, reach in _tiles(mask, queries, k.shape[1]):
        q_rows, g_rows = _rows(q, tile), _rows(g, tile)
        scores, slope = _scores(q_rows, k, batch, mask, terms, tile, reach)
        weights = jnp.exp(scores - _rows(log_total, tile))
        dweights = _matmul(g_rows, v[:, reach], transpose_b=True)
        dscores = weights * (dweights - _rows(delta, tile))
        if dbias is not None:
            part = _part_of_bias(dbias, tile, reach)
            whole = dscores.reshape(batch, -1, tile.stop - tile.start, dscores.shape[2])
            dbias = dbias.at[part].add(_sum_to(whole, dbias[part].shape))
        dscores = (terms.scale * (dscores if slope is None else slope * dscores)).astype(k.dtype)
        weights, dscores = jax.lax.optimization_barrier((weights.astype(v.dtype), dscores))
        dqs.append(_matmul(dscores, k[:, reach]).reshape(-1, groups, tile.stop - tile.start, k.shape[-1]))
        dk = dk.at[:, :, reach].add(_matmul(swap_last(q_rows), dscores))
        dv = dv.at[:, :, reach].add(_matmul(swap_last(g_rows), weights))
    dq = _merge_heads(jnp.concatenate(dqs, axis=2).astype(q.dtype), batch)
    dk, dv = (_merge_heads(jnp.swapaxes(x.astype(k.dtype), 1, 2)[:, None], batch) for x in (dk, dv))
    return dq, dk, dv, None, _term_gradients(terms, dbias, log_total, delta, batch)


def _sum_to(x: Float[Array, "..."], shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Returns the sum over the axes that `shape` broadcasts."""
    return x.sum(axis=tuple(i for i, size in enumerate(shape) if size == 1), keepdims=True)


def _term_gradients(
    terms: ScoreTerms,
    dbias: Float[Array, "#B #N #T #S"] | None,
    log_total: Float[Array, "BK G T 1"],
    delta: Float[Array, "BK G T 1"],
    batch: int,
) -> ScoreTerms:
    shares = {}
    if terms.bias is not None:
        shares["bias"] = dbias.astype(terms.bias.dtype)
    if terms.alibi is not None:
        shares["alibi"] = jnp.zeros_like(terms.alibi)
    if terms.sinks is not None:
        heads = (batch, -1, *log_total.shape[2:])
        sinks = terms.sinks.astype(jnp.float32)[None, :, None, None]
        weights = jnp.exp(sinks - log_total.reshape(heads))
        shares["sinks"] = -jnp.sum(weights * delta.reshape(heads), axis=(0, 2, 3)).astype(terms.sinks.dtype)
    return dataclasses.replace(terms, **shares)


attention.defvjp(_attention_fwd, _attention_bwd)

"""Attention for CPU: tiles of queries against the keys that they can reach, with a gradient of its
own.

What makes it fast: batched matmuls over `[B·K]` that the matmul library takes as they are (no
operand transposed on the left), the division by the softmax's denominator after the matmul with the
values, blocks above the diagonal never computed, only the log of the denominator kept for the
backward pass, and shares: the library runs small matmuls on one thread, but the runtime gives
    threads of their own to those that do not wait for each other.

What keeps memory linear in length: tiles stay as they are however many there are. The few of a
short sequence are written out, each with its own reach. Those of a long one are loops over as many
bands, in which all tiles take what the band reaches.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask, Span
from research.kernels.attention.terms import ScoreTerms
from research.kernels.row_major import swap_last

TILE, MAX_BANDS = 128, 8
# How many shares a call is cut into, where each has so many scores; more of them take longer to
# compile.
SHARES, SHARE_SCORES = 4, 2**18
# exp gives 0 for it whatever is subtracted, and sums with it stay finite.
HIDDEN = -1e30


_Step = Callable[[Any, Span, Span], tuple[Any, tuple[Array, ...]]]


@dataclasses.dataclass(frozen=True)
class _Band:
    """Tiles of queries that follow each other, and the keys that they can reach.

    Attributes:
      start: the first query.
      rows: queries of each tile.
      tiles: how many.
      reach: the keys.
    """

    start: int
    rows: int
    tiles: int
    reach: Span

    def visit(self, step: _Step, carry: Any) -> tuple[Any, tuple[Array, ...]]:
        """Folds `carry, outs = step(carry, tile, reach)` over the tiles; `outs` `[BK, G, R, _]` are
        joined along R.
        """
        if self.tiles == 1:
            return step(carry, Span(self.start, self.rows), self.reach)
        starts = self.start + self.rows * jnp.arange(self.tiles)
        carry, outs = jax.lax.scan(
            lambda c, start: step(c, Span(start, self.rows), self.reach), carry, starts
        )
        return carry, tuple(
            jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], -1, x.shape[-1]) for x in outs
        )


def _bands(mask: AttentionMask, queries: int, keys: int) -> Iterator[_Band]:
    """Yields the bands that hold all queries."""
    size = TILE * math.ceil(queries / (TILE * MAX_BANDS))
    for first in range(0, queries, size):
        tiles, rest = divmod(min(size, queries - first), TILE)
        for start, rows, count in ((first, TILE, tiles), (first + tiles * TILE, rest, 1)):
            if rows * count:
                reach = mask.reach(start, start + rows * count, keys)
                yield _Band(start, rows, count, Span(reach.start, reach.stop - reach.start))


@dataclasses.dataclass(frozen=True)
class _Share:
    """Sequences, key heads and query heads that are computed by themselves."""

    sequences: slice
    kv_heads: slice
    heads: slice

    def of_mask(self, mask: AttentionMask) -> AttentionMask:
        return jax.tree.map(lambda x: x[self.sequences], mask)

    def of_terms(self, terms: ScoreTerms) -> ScoreTerms:
        return jax.tree.map(lambda x: x[self.part(x)], terms)

    def part(self, term: Array) -> tuple[slice, ...]:
        """Returns where the share of a term stands: an axis that is broadcast is whole."""
        if term.ndim == 1:
            return (self.heads,)
        whole = slice(None)
        return self.sequences if term.shape[0] > 1 else whole, self.heads if term.shape[
            1
        ] > 1 else whole


def _shares(shape: tuple[int, ...], keys: int, kv_heads: int) -> list[list[_Share]]:
    """Returns the shares of the key heads of the shares of the batch, of queries of a `shape`."""
    batch, queries, heads, _ = shape
    wanted = min(SHARES, batch * heads * queries * keys // SHARE_SCORES)
    if jax.sharding.get_abstract_mesh().size > 1:
        wanted = 1  # The partitioner would gather what is cut.
    sequences = _even_cuts(batch, wanted)
    groups, cuts = heads // kv_heads, _even_cuts(kv_heads, wanted // len(sequences))
    return [
        [_Share(s, h, slice(h.start * groups, h.stop * groups)) for h in cuts] for s in sequences
    ]


def _even_cuts(size: int, parts: int) -> list[slice]:
    length = math.ceil(size / max(1, min(size, parts)))
    return [slice(start, min(start + length, size)) for start in range(0, size, length)]


def _put_together(parts: list[list[Float[Array, "_ T _ H"]]]) -> Float[Array, "B T N H"]:
    return jnp.concatenate([jnp.concatenate(row, axis=2) for row in parts])


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


def _rows(x: Float[Array, "BK G T H"], tile: Span) -> Float[Array, "BK R H"]:
    """Returns the queries of a tile, those of a group's heads under each other."""
    return jax.lax.dynamic_slice_in_dim(x, *tile, axis=2).reshape(x.shape[0], -1, x.shape[-1])


def _reached(x: Float[Array, "BK S H"], reach: Span) -> Float[Array, "BK C H"]:
    return x[:, reach.start : reach.start + reach.size]


def _scores(
    q: Float[Array, "BK R H"],
    k: Float[Array, "BK C H"],
    batch: int,
    mask: AttentionMask,
    terms: ScoreTerms,
    tile: Span,
    reach: Span,
) -> tuple[Float[Array, "BK R C"], Float[Array, "BK R C"] | None]:
    """Returns the scores of a tile and the slope of the cap."""
    scores, slope = terms.scale * _matmul(q, k, transpose_b=True), None
    flat, kv_heads = scores.shape, k.shape[0] // batch
    if terms.softcap is not None:
        bounded = jnp.tanh(scores / terms.softcap)
        scores, slope = terms.softcap * bounded, 1 - jnp.square(bounded)
    scores = scores.reshape(batch, kv_heads, -1, tile.size, reach.size)
    if terms.bias is not None:
        part = jax.lax.dynamic_slice(terms.bias, *_part_of_bias(terms.bias, tile, reach))
        heads = (kv_heads, -1) if part.shape[1] > 1 else (1, 1)
        scores += part.reshape(part.shape[0], *heads, *part.shape[2:])
    if terms.alibi is not None:
        slopes = terms.alibi.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)
        scores -= slopes * mask.distance(tile, reach)[:, :, None]
    return jnp.where(mask.block(tile, reach)[:, :, None], scores, HIDDEN).reshape(flat), slope


def _part_of_bias(
    bias: Float[Array, "#B #N #T #S"], tile: Span, reach: Span
) -> tuple[tuple, tuple[int, ...]]:
    """Returns where the bias of a tile starts, and its shape: an axis that is broadcast is
    whole.
    """
    sizes = bias.shape
    rows, columns = tile if sizes[2] > 1 else Span(0, 1), reach if sizes[3] > 1 else Span(0, 1)
    return (0, 0, rows.start, columns.start), (*sizes[:2], rows.size, columns.size)


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

    def step(_: None, tile: Span, reach: Span) -> tuple[None, tuple[Array, Array]]:
        scores, _ = _scores(_rows(q, tile), _reached(k, reach), batch, mask, terms, tile, reach)
        top = jnp.max(scores, axis=-1, keepdims=True, initial=HIDDEN / 2)
        # The barrier keeps the sum from computing the exponential a second time.
        weights = jax.lax.optimization_barrier(jnp.exp(scores - top).astype(v.dtype))
        total = jnp.sum(weights, axis=-1, keepdims=True, dtype=jnp.float32)
        seen = total > 0
        if terms.sinks is not None:
            sinks = _sinks(terms, k.shape[0] // batch, tile.size)
            total += jnp.exp(sinks - top.reshape(batch, *sinks.shape[1:])).reshape(total.shape)
        out = _matmul(weights, _reached(v, reach)) / jnp.where(seen, total, 1.0)
        log_total = jnp.where(seen, top + jnp.log(total), jnp.inf)
        return None, tuple(
            x.reshape(*q.shape[:2], tile.size, -1) for x in (out.astype(v.dtype), log_total)
        )

    bands = _bands(mask, q.shape[2], k.shape[1])
    outs, log_totals = zip(*(band.visit(step, None)[1] for band in bands), strict=True)
    return jnp.concatenate(outs, axis=2), jnp.concatenate(log_totals, axis=2)


def _backward(
    saved: tuple[Array, ...],
    g: Float[Array, "BK G T H"],
    batch: int,
    mask: AttentionMask,
    terms: ScoreTerms,
) -> tuple[Array, Array, Array, ScoreTerms]:
    """Returns the gradients of q, k and v, heads first, and those of the terms in float32."""
    q, k, v, out, log_total = saved

    def step(carry: tuple, tile: Span, reach: Span) -> tuple[tuple, tuple[Array]]:
        dk, dv, dterms = carry
        q_rows, g_rows, keys = _rows(q, tile), _rows(g, tile), _reached(k, reach)
        scores, slope = _scores(q_rows, keys, batch, mask, terms, tile, reach)
        weights = jnp.exp(scores - _rows(log_total, tile))
        dweights = _matmul(g_rows, _reached(v, reach), transpose_b=True)
        delta = jnp.sum(
            g_rows.astype(jnp.float32) * _rows(out, tile).astype(jnp.float32),
            axis=-1,
            keepdims=True,
        )
        dscores = weights * (dweights - delta)
        dterms = _add_to_terms(
            dterms, terms, dscores, delta, _rows(log_total, tile), batch, tile, reach
        )
        dscores = (terms.scale * (dscores if slope is None else slope * dscores)).astype(k.dtype)
        weights, dscores = jax.lax.optimization_barrier((weights.astype(v.dtype), dscores))
        dq = _matmul(dscores, keys).reshape(*q.shape[:2], tile.size, -1)
        dk += _matmul(swap_last(q_rows), dscores)
        dv += _matmul(swap_last(g_rows), weights)
        return (dk, dv, dterms), (dq.astype(q.dtype),)

    # Transposed, so that the small operand of the matmul is the one on the left.
    dk, dv = (jnp.zeros((x.shape[0], x.shape[2], x.shape[1]), jnp.float32) for x in (k, v))
    dqs, dterms = [], _zeros_like(terms)
    for band in _bands(mask, q.shape[2], k.shape[1]):
        columns = slice(band.reach.start, band.reach.start + band.reach.size)
        (dk_part, dv_part, dterms), (dq,) = band.visit(
            step, (dk[:, :, columns], dv[:, :, columns], dterms)
        )
        dk, dv = dk.at[:, :, columns].set(dk_part), dv.at[:, :, columns].set(dv_part)
        dqs.append(dq)
    dk, dv = (jnp.swapaxes(x.astype(k.dtype), 1, 2)[:, None] for x in (dk, dv))
    return jnp.concatenate(dqs, axis=2), dk, dv, dterms


def _zeros_like(terms: ScoreTerms) -> ScoreTerms:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), terms)


def _add_to_terms(
    sums: ScoreTerms,
    terms: ScoreTerms,
    dscores: Float[Array, "BK R C"],
    delta: Float[Array, "BK R 1"],
    log_total: Float[Array, "BK R 1"],
    batch: int,
    tile: Span,
    reach: Span,
) -> ScoreTerms:
    """Returns `sums`, the gradients of the terms, with those of a tile."""
    shares = {}
    if terms.bias is not None:
        start, shape = _part_of_bias(sums.bias, tile, reach)
        whole = dscores.reshape(batch, -1, tile.size, reach.size)
        part = whole.sum(axis=tuple(i for i, size in enumerate(shape) if size == 1), keepdims=True)
        part += jax.lax.dynamic_slice(sums.bias, start, shape)
        shares["bias"] = jax.lax.dynamic_update_slice(sums.bias, part, start)
    if terms.sinks is not None:
        sinks = _sinks(terms, delta.shape[0] // batch, tile.size)
        weighted = delta * jnp.exp(sinks - log_total.reshape(batch, *sinks.shape[1:])).reshape(
            delta.shape
        )
        shares["sinks"] = sums.sinks - weighted.reshape(batch, -1, tile.size).sum(axis=(0, 2))
    return dataclasses.replace(sums, **shares)


def unsupported_reason(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], mask: AttentionMask, terms: ScoreTerms
) -> None:
    """Takes everything."""


@jax.custom_vjp
def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> Float[Array, "B T N H"]:
    """Attention by tiles of queries; see the API of the package for the equation.

    Source: the backward pass is Dao 2023 (FlashAttention-2), arXiv:2307.08691, algorithm 2, with
        whole rows of scores.
    """
    return _attention_fwd(q, k, v, mask, terms)[0]


def _attention_fwd(
    q: Array, k: Array, v: Array, mask: AttentionMask, terms: ScoreTerms
) -> tuple[Array, tuple]:
    def one(share: _Share) -> tuple[Array, tuple[Array, ...]]:
        parts = (
            q[share.sequences, :, share.heads],
            *(x[share.sequences, :, share.kv_heads] for x in (k, v)),
        )
        batch, _, kv_heads, _ = parts[1].shape
        mine = (
            _split_heads(parts[0], kv_heads),
            *(_split_heads(x, kv_heads)[:, 0] for x in parts[1:]),
        )
        out, log_total = _forward(*mine, batch, share.of_mask(mask), share.of_terms(terms))
        return _merge_heads(out, batch), (*mine, out, log_total)

    found = [[one(share) for share in row] for row in _shares(q.shape, *k.shape[1:3])]
    outs, saved = ([[pair[which] for pair in row] for row in found] for which in (0, 1))
    return _put_together(outs), (saved, mask, terms)


def _attention_bwd(saved: tuple, g: Float[Array, "B T N H"]) -> tuple:
    saved, mask, terms = saved
    keys = [mine[1].shape for row in saved for mine in row]
    dterms = _zeros_like(terms)
    found = []
    for shares, row in zip(
        _shares(g.shape, keys[0][1], sum(x[0] for x in keys) // g.shape[0]), saved, strict=True
    ):
        found.append([])
        for share, mine in zip(shares, row, strict=True):
            part = g[share.sequences, :, share.heads]
            batch = part.shape[0]
            part = _split_heads(part, mine[1].shape[0] // batch)
            *grads, dpart = _backward(mine, part, batch, share.of_mask(mask), share.of_terms(terms))
            found[-1].append([_merge_heads(x, batch) for x in grads])
            dterms = jax.tree.map(
                lambda x, y, share=share: x.at[share.part(x)].add(y), dterms, dpart
            )
    dq, dk, dv = (
        _put_together([[grads[which] for grads in row] for row in found]) for which in range(3)
    )
    return dq, dk, dv, None, jax.tree.map(lambda x, y: x.astype(y.dtype), dterms, terms)


attention.defvjp(_attention_fwd, _attention_bwd)

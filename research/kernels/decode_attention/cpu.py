"""Decode attention for CPU: a loop over the pieces of all sequences, each of as many tokens as the
cache near it holds.

What makes it fast: a sequence is walked for its own length, its keys and values go from their pages
straight into float32 operands of one matmul a head, and they are read again while they are still
near.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.attention import ScoreTerms
from research.kernels.decode_attention.pages import KVPages, needed
from research.kernels.decode_attention.rows import behind, by_row, fold, unfold

# Tokens of a piece: keys and values of 8 heads of 128 fill 2 MB.
PIECE = 256
# exp gives 0 for it whatever is subtracted, and sums with it stay finite.
HIDDEN = -1e30

Sums = tuple[Float[Array, "*B K GR H"], Float[Array, "*B K GR 1"], Float[Array, "*B K GR 1"]]


def unsupported_reason(
    q: Float[Array, "B R N H"], pages: KVPages, window: int | None, terms: ScoreTerms
) -> None:
    """Takes everything."""


def decode_attention(
    q: Float[Array, "B R N H"],
    pages: KVPages,
    table: Int[Array, "B pages_per_sequence"],
    lengths: Int[Array, "B"],
    window: int | None,
    terms: ScoreTerms,
) -> Float[Array, "B R N H"]:
    """Decode attention piece by piece, in float32; see the API of the package for the equation."""
    rows, heads = q.shape[1:3]
    first, end = needed(lengths, rows, pages.page_size, window)
    chunk = min(table.shape[1], max(1, PIECE // pages.page_size))
    ends = jnp.cumsum((end - first + chunk - 1) // chunk)
    folded = fold(q, pages.kv_heads).astype(jnp.float32) * terms.scale

    def step(index: Array, sums: Sums) -> Sums:
        row = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
        before = jnp.where(row > 0, ends[row - 1], 0)
        places = first[row] + (index - before) * chunk + jnp.arange(chunk)
        # Past the last page its own id is read again: what the table holds there is anything.
        ids = table[row, jnp.minimum(places, end[row] - 1)]
        # It depends on the loop, or else the compiler widens every page before it.
        here, _ = jax.lax.optimization_barrier((pages, index))
        seen = _visible(
            places, pages.page_size, lengths[row], rows, heads // pages.kv_heads, window
        )
        mine = jax.tree.map(lambda x: x[row], sums)
        mine = _add_piece(mine, folded[row], here, ids, seen, terms)
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, row, 0), sums, mine
        )

    column = jnp.zeros((*folded.shape[:3], 1), jnp.float32)
    out, top, total = jax.lax.fori_loop(
        0, ends[-1], step, (jnp.zeros_like(folded), column + HIDDEN / 2, column)
    )
    seen = total > 0
    if terms.sinks is not None:
        total += jnp.exp(by_row(terms.sinks, pages.kv_heads, rows)[None, :, :, None] - top)
    return unfold(out / jnp.where(seen, total, 1.0), rows).astype(q.dtype)


def _visible(
    places: Int[Array, "n"],
    page_size: int,
    length: Int[Array, ""],
    rows: int,
    group: int,
    window: int | None,
) -> tuple[Int[Array, "GR S"], Array]:
    """Returns how far each key lies behind each row, and which of them the row sees."""
    keys = (places[:, None] * page_size + jnp.arange(page_size)[None]).reshape(-1)
    distance = (length - behind(rows, group))[:, None] - keys[None]
    seen = distance >= 0
    return distance, seen if window is None else seen & (distance < window)


def _add_piece(
    sums: Sums,
    q: Float[Array, "K GR H"],
    pages: KVPages,
    ids: Int[Array, "n"],
    visible: tuple[Int[Array, "GR S"], Array],
    terms: ScoreTerms,
) -> Sums:
    """Returns the sums, maximum and denominator with some pages added."""
    out, top, total = sums
    (distance, seen), kv_heads = visible, q.shape[0]

    def piece(x: Array) -> Array:
        return jnp.swapaxes(x.at[ids].get(mode="clip"), 0, 1).reshape(kv_heads, -1, *x.shape[3:])

    def numbers(x: Array) -> Array:
        return jax.lax.optimization_barrier(
            jnp.where(seen.any(axis=0)[:, None], piece(x).astype(jnp.float32), 0.0)
        )

    scores = jax.lax.dot_general(q, numbers(pages.key), (((2,), (2,)), ((0,), (0,))))
    if pages.quantized:
        scores *= piece(pages.key_scale)[:, None]
    if terms.softcap is not None:
        scores = terms.softcap * jnp.tanh(scores / terms.softcap)
    if terms.alibi is not None:
        slopes = by_row(terms.alibi, kv_heads, q.shape[1] * kv_heads // terms.alibi.shape[0])
        scores -= slopes[:, :, None] * distance.astype(jnp.float32)[None]
    scores = jnp.where(seen, scores, HIDDEN)
    new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
    # The barrier keeps the sum from computing the exponential a second time.
    weights = jax.lax.optimization_barrier(jnp.exp(scores - new_top))
    shrink = jnp.exp(top - new_top)
    total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
    if pages.quantized:
        weights = jnp.where(seen, weights * piece(pages.value_scale)[:, None], 0.0)
    out = out * shrink + jax.lax.dot_general(
        weights, numbers(pages.value), (((2,), (1,)), ((0,), (0,)))
    )
    return out, new_top, total

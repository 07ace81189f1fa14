"""Decode attention for CPU: a loop over the chunks of all sequences, each of as many tokens as the
cache of a core holds.

What makes it fast: a sequence takes as many chunks as its own length needs, its keys and values are
read from their pages straight into float32 operands of one matmul a head, and the matmuls read them
while they are still in the cache.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.kernels.attention import ScoreTerms
from research.kernels.decode_attention.pages import KVPages, page_range
from research.kernels.decode_attention.rows import distance_to_end, fold, per_row, unfold

# Tokens of a chunk: keys and values of 8 heads of 128 fill 2 MB.
CHUNK = 256
# The score of a masked key: exp of it is 0 whatever is subtracted, and sums with it stay finite.
MASKED = -1e30

# Σ exp(score - max) v, the largest score, and Σ exp(score - max), of each row.
Sums = tuple[Float[Array, "*B K rows H"], Float[Array, "*B K rows 1"], Float[Array, "*B K rows 1"]]


def unsupported_reason(
    q: Float[Array, "B T N H"], pages: KVPages, window: int | None, terms: ScoreTerms
) -> None:
    """Takes everything."""


def decode_attention(
    q: Float[Array, "B T N H"],
    pages: KVPages,
    table: Int[Array, "B pages_per_sequence"],
    lengths: Int[Array, "B"],
    window: int | None,
    terms: ScoreTerms,
) -> Float[Array, "B T N H"]:
    """Decode attention chunk by chunk, in float32; see the API of the package for the equation."""
    queries, heads = q.shape[1:3]
    group = heads // pages.kv_heads
    first, end = page_range(lengths, queries, pages.page_size, window)
    chunk_pages = min(table.shape[1], max(1, CHUNK // pages.page_size))
    # Sequences of 3 and 2 chunks: ends [3, 5]
    chunk_ends = jnp.cumsum((end - first + chunk_pages - 1) // chunk_pages)
    scaled_q = fold(q, pages.kv_heads).astype(jnp.float32) * terms.scale

    def step(index: Array, sums: Sums) -> Sums:
        # With ends [3, 5], chunk 4 is the second of sequence 1.
        sequence = jnp.searchsorted(chunk_ends, index, side="right").astype(jnp.int32)
        before = jnp.where(sequence > 0, chunk_ends[sequence - 1], 0)
        entries = first[sequence] + (index - before) * chunk_pages + jnp.arange(chunk_pages)
        # Entries past the last page read that page again: what the table has there is undefined.
        ids = table[sequence, jnp.minimum(entries, end[sequence] - 1)]

        # The barrier ties the pages to the loop; else XLA converts all pages to float32 before it.
        loop_pages, _ = jax.lax.optimization_barrier((pages, index))
        visible = _visible(entries, pages.page_size, lengths[sequence], queries, group, window)
        own_sums = jax.tree.map(lambda x: x[sequence], sums)
        own_sums = _add_chunk(own_sums, scaled_q[sequence], loop_pages, ids, visible, terms)
        return jax.tree.map(
            lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, sequence, 0), sums, own_sums
        )

    zeros = jnp.zeros((*scaled_q.shape[:3], 1), jnp.float32)
    chunks = chunk_ends[-1]
    sums = (jnp.zeros_like(scaled_q), zeros + MASKED / 2, zeros)
    out, max_score, denominator = jax.lax.fori_loop(0, chunks, step, sums)

    # Rows of negative position attend to nothing, and get zeros even with a sink.
    any_visible = denominator > 0
    if terms.sinks is not None:
        sinks = per_row(terms.sinks, pages.kv_heads, queries)[None, :, :, None]
        denominator += jnp.exp(sinks - max_score)
    return unfold(out / jnp.where(any_visible, denominator, 1.0), queries).astype(q.dtype)


def _visible(
    entries: Int[Array, "chunk_pages"],
    page_size: int,
    length: Int[Array, ""],
    queries: int,
    group: int,
    window: int | None,
) -> tuple[Int[Array, "rows S"], Bool[Array, "rows S"]]:
    """Returns the position of each row minus that of each key, and whether it attends to it."""
    # Entries [2, 3] of pages of 4 tokens -> keys [8, 9, ..., 15]
    keys = (entries[:, None] * page_size + jnp.arange(page_size)[None]).reshape(-1)
    distance = (length - distance_to_end(queries, group))[:, None] - keys[None]
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    return distance, visible


def _add_chunk(
    sums: Sums,
    q: Float[Array, "K rows H"],
    pages: KVPages,
    ids: Int[Array, "chunk_pages"],
    visible: tuple[Int[Array, "rows S"], Bool[Array, "rows S"]],
    terms: ScoreTerms,
) -> Sums:
    """Returns the sums with some pages added: a step of online softmax."""
    out, max_score, denominator = sums
    distance, visible_keys = visible
    kv_heads = q.shape[0]

    def take(x: Array) -> Array:
        # [chunk_pages, K, page_size, ...] -> [K, S, ...]
        found = jnp.swapaxes(x.at[ids].get(mode="clip"), 0, 1)
        return found.reshape(kv_heads, -1, *x.shape[3:])

    def operand(x: Array) -> Array:
        # Slots that nobody wrote may hold NaN, and a weight of zero times NaN is NaN.
        any_row = visible_keys.any(axis=0)[:, None]
        kept = jnp.where(any_row, take(x).astype(jnp.float32), 0.0)
        return jax.lax.optimization_barrier(kept)

    # [K, rows, H] [K, S, H] -> [K, rows, S]
    scores = jax.lax.dot_general(q, operand(pages.key), (((2,), (2,)), ((0,), (0,))))
    if pages.quantized:
        scores *= take(pages.key_scale)[:, None]
    if terms.softcap is not None:
        scores = terms.softcap * jnp.tanh(scores / terms.softcap)
    if terms.alibi is not None:
        queries = q.shape[1] * kv_heads // terms.alibi.shape[0]
        slopes = per_row(terms.alibi, kv_heads, queries)
        scores -= slopes[:, :, None] * distance.astype(jnp.float32)[None]
    scores = jnp.where(visible_keys, scores, MASKED)

    new_max = jnp.maximum(max_score, jnp.max(scores, axis=-1, keepdims=True))
    # The barrier keeps the sum from computing the exponential a second time.
    weights = jax.lax.optimization_barrier(jnp.exp(scores - new_max))
    rescale = jnp.exp(max_score - new_max)
    denominator = denominator * rescale + jnp.sum(weights, axis=-1, keepdims=True)
    if pages.quantized:
        scaled = weights * take(pages.value_scale)[:, None]
        weights = jnp.where(visible_keys, scaled, 0.0)

    # [K, rows, S] [K, S, H] -> [K, rows, H]
    rescaled = out * rescale
    added = jax.lax.dot_general(weights, operand(pages.value), (((2,), (1,)), ((0,), (0,))))
    return rescaled + added, new_max, denominator

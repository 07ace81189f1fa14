"""Decode attention for CPU: a loop over the chunks of all sequences, each of as many tokens as the
cache of a core holds.

What makes it fast: a sequence takes as many chunks as its own length needs, its keys and values are
read from their pages straight into float32 operands of one matmul per head, and the matmuls read
them while they are still in the cache.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from research.kernels.attention import ScoreTerms
from research.kernels.decode_attention.pages import KVPages, page_range
from research.kernels.decode_attention.rows import distance_to_end, fold, per_row, unfold

# Tokens of a chunk: keys and values of 8 heads of 128 fill 2 MB.
CHUNK = 256
# The score of a masked key: finite, so that sums stay finite. exp(MASKED - m) is 0 for every
# running maximum m, which starts at MASKED / 2.
MASKED = -1e30

# Σ exp(score - max) v, the largest score, and Σ exp(score - max), of each row.
Sums = tuple[Float[Array, "*B K rows H"], Float[Array, "*B K rows 1"], Float[Array, "*B K rows 1"]]


def unsupported_reason(
    q: Float[Array, "B T N H"], pages: KVPages, window: int | None, terms: ScoreTerms
) -> None:
    """Returns None: every call is supported."""


def decode_attention(
    q: Float[Array, "B T N H"],
    pages: KVPages,
    table: Int[Array, "B pages_per_sequence"],
    lengths: Int[Array, "B"],
    window: int | None,
    terms: ScoreTerms,
) -> Float[Array, "B T N H"]:
    """Decode attention chunk by chunk, in float32; see the API of the package for the equation."""
    _, queries, heads, _ = q.shape
    group = heads // pages.kv_heads
    first, end = page_range(lengths, queries, pages.page_size, window)
    table_pages = table.shape[1]
    chunk_pages = max(1, CHUNK // pages.page_size)
    chunk_pages = min(table_pages, chunk_pages)
    # Sequences of 3 and 2 chunks: ends [3, 5]
    needed_pages = end - first
    chunks = (needed_pages + chunk_pages - 1) // chunk_pages
    chunk_ends = jnp.cumsum(chunks)
    rows = fold(q, pages.kv_heads)
    scaled_q = rows.astype(jnp.float32) * terms.scale

    def step(index: Array, sums: Sums) -> Sums:
        # With ends [3, 5], chunk 4 is the second of sequence 1.
        sequence = jnp.searchsorted(chunk_ends, index, side="right")
        sequence = sequence.astype(jnp.int32)
        end_before = chunk_ends[sequence - 1]
        chunks_before = jnp.where(sequence > 0, end_before, 0)
        chunk = index - chunks_before
        first_entry = first[sequence] + chunk * chunk_pages
        entries = first_entry + jnp.arange(chunk_pages)
        # Entries past the last page read that page again: what the table has there is undefined.
        last = end[sequence] - 1
        read_entries = jnp.minimum(entries, last)
        ids = table[sequence, read_entries]

        def take(x: Array) -> Array:
            return x[sequence]

        def put(x: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(x, new, sequence, 0)

        # The barrier ties the pages to the loop; else XLA converts all pages to float32 before it.
        loop_pages, _ = jax.lax.optimization_barrier((pages, index))
        visible = _visible(entries, pages.page_size, lengths[sequence], queries, group, window)
        own_sums = jax.tree.map(take, sums)
        own_q = scaled_q[sequence]
        own_sums = _add_chunk(own_sums, own_q, loop_pages, ids, visible, terms)
        return jax.tree.map(put, sums, own_sums)

    # Of each row: [B, K, rows, H] and [B, K, rows, 1]
    zeros = jnp.zeros((*scaled_q.shape[:3], 1), jnp.float32)
    initial_max = zeros + MASKED / 2
    sums = (jnp.zeros_like(scaled_q), initial_max, zeros)
    sums = jax.lax.fori_loop(0, chunk_ends[-1], step, sums)
    out = _divided(sums, queries, terms)
    return out.astype(q.dtype)


def _divided(sums: Sums, queries: int, terms: ScoreTerms) -> Float[Array, "B T N H"]:
    """Returns out / denominator by token, with the sinks in the denominator if there are any."""
    out, max_score, denominator = sums
    kv_heads = out.shape[1]
    # Rows of negative position attend to nothing, and get zeros even with a sink.
    any_visible = denominator > 0

    if terms.sinks is not None:
        # [N] -> [K, rows] -> [B, K, rows, 1]
        sinks = per_row(terms.sinks, kv_heads, queries)
        sinks = sinks[None, :, :, None]
        sink_weights = jnp.exp(sinks - max_score)
        denominator += sink_weights
    divisor = jnp.where(any_visible, denominator, 1.0)
    out = out / divisor
    return unfold(out, queries)


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
    slots = jnp.arange(page_size)
    first_keys = entries[:, None] * page_size
    keys = first_keys + slots[None]
    keys = keys.reshape(-1)
    positions = length - distance_to_end(queries, group)
    distance = positions[:, None] - keys[None]
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
    any_row = visible_keys.any(axis=0)

    def operand(x: Array) -> Array:
        # Slots that nobody wrote may hold NaN, and a weight of zero times NaN is NaN.
        taken = _take_pages(x, ids)
        taken = taken.astype(jnp.float32)
        kept = jnp.where(any_row[:, None], taken, 0.0)
        return jax.lax.optimization_barrier(kept)

    # [K, rows, H] [K, S, H] -> [K, rows, S]
    keys = operand(pages.key)
    scores = jax.lax.dot_general(q, keys, (((2,), (2,)), ((0,), (0,))))
    if pages.quantized:
        key_scale = _take_pages(pages.key_scale, ids)
        scores *= key_scale[:, None]
    scores = _with_terms(scores, distance, terms)
    scores = jnp.where(visible_keys, scores, MASKED)

    chunk_max = jnp.max(scores, axis=-1, keepdims=True)
    new_max = jnp.maximum(max_score, chunk_max)
    # The barrier keeps the sum from computing the exponential a second time.
    weights = jnp.exp(scores - new_max)
    weights = jax.lax.optimization_barrier(weights)
    rescale = jnp.exp(max_score - new_max)
    chunk_sum = jnp.sum(weights, axis=-1, keepdims=True)
    denominator = denominator * rescale + chunk_sum
    if pages.quantized:
        value_scale = _take_pages(pages.value_scale, ids)
        scaled = weights * value_scale[:, None]
        weights = jnp.where(visible_keys, scaled, 0.0)

    # [K, rows, S] [K, S, H] -> [K, rows, H]
    rescaled_out = out * rescale
    values = operand(pages.value)
    added = jax.lax.dot_general(weights, values, (((2,), (1,)), ((0,), (0,))))
    return rescaled_out + added, new_max, denominator


def _take_pages(
    x: Shaped[Array, "pages K slots *H"], ids: Int[Array, "chunk_pages"]
) -> Shaped[Array, "K S *H"]:
    """Returns the slots of some pages, one page after the other."""
    found = x.at[ids].get(mode="clip")
    # [chunk_pages, K, page_size, H] -> [K, chunk_pages, page_size, H] -> [K, S, H]
    by_head = jnp.swapaxes(found, 0, 1)
    kv_heads, _, _, *width = by_head.shape
    return by_head.reshape(kv_heads, -1, *width)


def _with_terms(
    scores: Float[Array, "K rows S"], distance: Int[Array, "rows S"], terms: ScoreTerms
) -> Float[Array, "K rows S"]:
    """Returns the scores with the soft cap and ALiBi."""
    if terms.softcap is not None:
        bounded = jnp.tanh(scores / terms.softcap)
        scores = terms.softcap * bounded
    if terms.alibi is None:
        return scores

    # N = 4 slopes, K = 2, 6 rows: G = 2 heads of T = 3 tokens
    kv_heads, rows, _ = scores.shape
    heads = terms.alibi.shape[0]
    queries = rows * kv_heads // heads
    slopes = per_row(terms.alibi, kv_heads, queries)
    distance = distance.astype(jnp.float32)
    return scores - slopes[:, :, None] * distance[None]

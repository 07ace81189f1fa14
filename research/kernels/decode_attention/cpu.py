"""Decode attention for CPU: a loop over sequences, and in it one over chunks of pages.

What makes it fast: a sequence takes as many pages as its own length needs; some pages at a time are
copied into float32 operands that fit in the cache of a core, and one matmul per page and head reads
them there.

A sequence is computed by the same operations in the same order whatever the others are: its chunks
depend on its own length, and the number of sequences is only that of the loop's turns.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from research.kernels.attention import ScoreTerms
from research.kernels.decode_attention.pages import KVPages, page_range
from research.kernels.decode_attention.rows import distance_to_end, fold, per_row, unfold

# Tokens of a chunk: float32 keys of 8 heads of 128 fill 256 kB.
CHUNK = 64
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
    batch, queries, _, _ = q.shape
    first, end = page_range(lengths, queries, pages.page_size, window)
    rows = fold(q, pages.kv_heads)
    scaled_q = rows.astype(jnp.float32) * terms.scale

    def step(sequence: Array, sums: Sums) -> Sums:
        added = _add_sequence(
            scaled_q[sequence],
            pages,
            table[sequence],
            (first[sequence], end[sequence], lengths[sequence]),
            queries,
            window,
            terms,
        )

        def put(x: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(x, new, sequence, 0)

        return jax.tree.map(put, sums, added)

    # Sequences after the last one that has tokens are left out. So the number of turns is known at
    # run time only, and the loop is compiled alike for any number of sequences, one included.
    is_last = jnp.where(lengths > 0, 1 + jnp.arange(batch), 0)
    sums = jax.lax.fori_loop(0, jnp.max(is_last), step, _empty_sums(scaled_q))
    out = _divided(sums, queries, terms)
    return out.astype(q.dtype)


def _empty_sums(q: Float[Array, "*B K rows H"]) -> Sums:
    """Returns the sums of no keys."""
    zeros = jnp.zeros((*q.shape[:-1], 1), jnp.float32)
    return jnp.zeros_like(q), zeros + MASKED / 2, zeros


def _add_sequence(
    q: Float[Array, "K rows H"],
    pages: KVPages,
    table: Int[Array, "pages_per_sequence"],
    bounds: tuple[Int[Array, ""], Int[Array, ""], Int[Array, ""]],
    queries: int,
    window: int | None,
    terms: ScoreTerms,
) -> Sums:
    """Returns the sums over the pages of a sequence.

    Args:
      q: its scaled queries.
      pages: of all sequences.
      table: its page ids.
      bounds: the first entry of the table that it needs, the end, and its length in tokens.
      queries: T.
      window, terms: as of `decode_attention`.
    """
    first, end, length = bounds
    chunk_pages = max(1, CHUNK // pages.page_size)
    chunk_pages = min(table.shape[0], chunk_pages)
    # Chunks of 4 pages, then pages one at a time where they are at most half a chunk:
    # 10 pages -> 2 chunks and 2 pages, 11 pages -> 3 chunks.
    rounded = end - first + (chunk_pages - 1) // 2
    chunks = rounded // chunk_pages

    def add(sums: Sums, entry: Array, count: int) -> Sums:
        # The barrier ties the pages to the loop; else XLA converts all pages to float32 before it.
        loop_pages, _ = jax.lax.optimization_barrier((pages, entry))
        entries = entry + jnp.arange(count)
        # Entries past the last page read that page again: what the table has there is undefined.
        read_entries = jnp.minimum(entries, end - 1)
        ids = table[read_entries]
        # Entries [2, 3] of pages of 4 tokens -> keys [[8, 9, 10, 11], [12, 13, 14, 15]]
        slots = jnp.arange(pages.page_size)
        keys = entries[:, None] * pages.page_size + slots[None]
        group = q.shape[1] // queries
        distance, visible = _visible(keys, length, queries, group, window)
        return _add_pages(sums, q, loop_pages, ids, keys < length, (distance, visible), terms)

    def add_chunk(index: Array, sums: Sums) -> Sums:
        return add(sums, first + index * chunk_pages, chunk_pages)

    def add_page(entry: Array, sums: Sums) -> Sums:
        return add(sums, entry, 1)

    sums = jax.lax.fori_loop(0, chunks, add_chunk, _empty_sums(q))
    if chunk_pages == 1:
        return sums
    return jax.lax.fori_loop(first + chunks * chunk_pages, end, add_page, sums)


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
    keys: Int[Array, "pages slots"],
    length: Int[Array, ""],
    queries: int,
    group: int,
    window: int | None,
) -> tuple[Int[Array, "pages rows slots"], Bool[Array, "pages rows slots"]]:
    """Returns the position of each row minus that of each key, and whether it attends to it."""
    positions = length - distance_to_end(queries, group)
    # [rows], [pages, slots] -> [pages, rows, slots]
    shape = (keys.shape[0], positions.shape[0], keys.shape[1])
    of_rows = jnp.broadcast_to(positions[None, :, None], shape)
    distance = of_rows - keys[:, None]
    visible = distance >= 0
    if window is not None:
        visible = visible & (distance < window)
    return distance, visible


def _add_pages(
    sums: Sums,
    q: Float[Array, "K rows H"],
    pages: KVPages,
    ids: Int[Array, "pages"],
    written: Bool[Array, "pages slots"],
    visible: tuple[Int[Array, "pages rows slots"], Bool[Array, "pages rows slots"]],
    terms: ScoreTerms,
) -> Sums:
    """Returns the sums with some pages added: a step of online softmax."""
    out, max_score, denominator = sums
    distance, visible_keys = visible
    visible_keys = visible_keys[:, None]
    count = ids.shape[0]

    # [pages, K, slots, H] [pages, K, rows, H] -> [pages, K, slots, rows]
    keys = _take_pages(pages, pages.key, ids)
    by_page = jnp.broadcast_to(q, (count, *q.shape))
    products = _matmul(jax.lax.optimization_barrier(keys), by_page, 2)
    scores = jnp.swapaxes(products, 2, 3)
    if pages.quantized:
        key_scale = _take(pages.key_scale, ids)
        scores *= key_scale[:, :, None]
    scores = _with_terms(scores, distance, terms)
    scores = jnp.where(visible_keys, scores, MASKED)

    # Over pages and slots: [pages, K, rows, slots] -> [K, rows, 1]
    chunk_max = jnp.max(scores, axis=(0, 3))
    new_max = jnp.maximum(max_score, chunk_max[..., None])
    # The barrier keeps the sum from computing the exponential a second time.
    weights = jnp.exp(scores - new_max[None])
    weights = jax.lax.optimization_barrier(weights)
    rescale = jnp.exp(max_score - new_max)
    chunk_sum = jnp.sum(weights, axis=(0, 3))
    denominator = denominator * rescale + chunk_sum[..., None]
    if pages.quantized:
        value_scale = _take(pages.value_scale, ids)
        scaled = weights * value_scale[:, :, None]
        weights = jnp.where(visible_keys, scaled, 0.0)

    # Slots that nobody wrote may hold NaN, and a weight of zero times NaN is NaN.
    # [pages, K, rows, slots] [pages, K, slots, H] -> [pages, K, rows, H]
    values = _take_pages(pages, pages.value, ids)
    values = jnp.where(written[:, None, :, None], values, 0.0)
    by_page = _matmul(weights, jax.lax.optimization_barrier(values), 1)
    added = jnp.sum(by_page, axis=0)
    return out * rescale + added, new_max, denominator


def _take_pages(
    pages: KVPages, x: Shaped[Array, "all_pages K slots H"], ids: Int[Array, "pages"]
) -> Float[Array, "pages K slots H"]:
    """Returns the keys or the values of some pages in float32."""
    return pages.numbers(_take(x, ids)).astype(jnp.float32)


def _take(
    x: Shaped[Array, "all_pages *page"], ids: Int[Array, "pages"]
) -> Shaped[Array, "pages *page"]:
    """Returns some pages of an array."""
    if ids.shape[0] == 1:
        # A slice is a plain copy.
        return jax.lax.dynamic_index_in_dim(x, ids[0], 0)
    return x.at[ids].get(mode="clip")


def _matmul(
    left: Float[Array, "pages K rows inner"], right: Float[Array, "pages K a b"], axis: int
) -> Float[Array, "pages K rows outer"]:
    """Returns the product of each page and head.

    Args:
      left: its last axis is summed over.
      right: so is one of its last two.
      axis: 1 for the one before the last, 2 for the last.
    """
    pages, kv_heads = left.shape[:2]
    # A matmul with one axis of batch is the fastest: [pages, K, ...] -> [pages · K, ...]
    left = left.reshape(-1, *left.shape[2:])
    right = right.reshape(-1, *right.shape[2:])
    product = jax.lax.dot_general(left, right, (((2,), (axis,)), ((0,), (0,))))
    return product.reshape(pages, kv_heads, *product.shape[1:])


def _with_terms(
    scores: Float[Array, "pages K rows slots"],
    distance: Int[Array, "pages rows slots"],
    terms: ScoreTerms,
) -> Float[Array, "pages K rows slots"]:
    """Returns the scores with the soft cap and ALiBi."""
    if terms.softcap is not None:
        bounded = jnp.tanh(scores / terms.softcap)
        scores = terms.softcap * bounded
    if terms.alibi is None:
        return scores

    # N = 4 slopes, K = 2, 6 rows: G = 2 heads of T = 3 tokens
    _, kv_heads, rows, _ = scores.shape
    heads = terms.alibi.shape[0]
    queries = rows * kv_heads // heads
    slopes = per_row(terms.alibi, kv_heads, queries)
    distance = distance.astype(jnp.float32)
    return scores - slopes[None, :, :, None] * distance[:, None]

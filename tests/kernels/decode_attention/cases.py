"""Calls of decode attention to test with: ragged sequences over shuffled pages, and the same call
in NumPy loops.
"""

import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from research.kernels.attention import ScoreTerms
from research.kernels.decode_attention import KVPages, empty_pages, write

NOWHERE = 10**6


def cache(rng, lengths, places, page_size, kv_heads, width, dtype="float32", spare=2):
    """Returns pages that hold `lengths` random tokens a sequence, their table, and the tokens.

    Pages lie in any order; the table holds no page at all past each sequence's end.
    """
    batch, slots = len(lengths), places * page_size
    table = rng.permutation(batch * places + spare)[: batch * places].reshape(batch, places)
    k, v = (
        jnp.asarray(rng.normal(size=(batch, slots, kv_heads, width)), jnp.float32) for _ in range(2)
    )
    pages = empty_pages(batch * places + spare, page_size, kv_heads, width, dtype)
    pages = write(pages, jnp.asarray(table), jnp.zeros(batch, jnp.int32), k, v)
    used = np.arange(places) * page_size < np.asarray(lengths)[:, None]
    return pages, jnp.asarray(np.where(used, table, NOWHERE)), (k, v)


def poisoned(pages: KVPages, table, lengths, first=None):
    """Returns the pages with NaN in every slot that no sequence has filled, and in those before the
    page `first`.
    """
    size, clean = pages.page_size, np.zeros((pages.key.shape[0], pages.page_size), bool)
    for row, length in enumerate(np.asarray(lengths)):
        for place in range(0 if first is None else int(first[row]), -(-int(length) // size)):
            clean[table[row, place], : min(size, int(length) - place * size)] = True

    def spoil(x):
        keep = clean[:, None, :, None] if x.ndim == 4 else clean[:, None]
        return jnp.where(keep, x, -128 if x.dtype == jnp.int8 else jnp.nan).astype(x.dtype)

    return KVPages(
        *(None if x is None else spoil(x) for x in (pages.key, pages.value, *scales(pages)))
    )


def scales(pages: KVPages):
    return pages.key_scale, pages.value_scale


def by_words(q, k, v, lengths, window, terms):
    """The API's docstring, read word by word: a row and a head at a time."""
    q, k, v, lengths = (np.asarray(x, np.float64) for x in (q, k, v, lengths))
    batch, rows, heads, _ = q.shape
    out = np.zeros(q.shape)
    for b, r, n in np.ndindex(batch, rows, heads):
        at, kv = int(lengths[b]) - rows + r, n // (heads // k.shape[2])
        seen = [s for s in range(at + 1) if window is None or at - s < window]
        if not seen:
            continue
        s = terms.scale * k[b, seen, kv] @ q[b, r, n]
        if terms.softcap is not None:
            s = terms.softcap * np.tanh(s / terms.softcap)
        if terms.alibi is not None:
            s -= float(terms.alibi[n]) * (at - np.array(seen))
        weights = np.exp(s)
        total = weights.sum() + (0 if terms.sinks is None else np.exp(float(terms.sinks[n])))
        out[b, r, n] = weights @ v[b, seen, kv] / total
    return out


@st.composite
def calls(draw, page_sizes, widths, dtypes, heads=((4, 2), (3, 1), (2, 2))):
    """Draws the arguments of an implementation, with the tokens in the pages as they were before
    they were written.
    """
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    rows, page_size = draw(st.sampled_from([1, 3])), draw(st.sampled_from(page_sizes))
    n, kv_heads = draw(st.sampled_from(heads))
    most = 5 * page_size
    lengths = draw(st.lists(st.integers(0, most) | st.just(page_size), min_size=3, max_size=3))
    width, dtype = draw(st.sampled_from(widths)), draw(st.sampled_from(dtypes))
    pages, table, tokens = cache(rng, lengths, 5, page_size, kv_heads, width, dtype)
    given = draw(st.sets(st.sampled_from(["softcap", "sinks", "alibi"])))
    terms = ScoreTerms(
        sinks=jnp.asarray(rng.normal(size=n), jnp.float32) if "sinks" in given else None,
        alibi=jnp.asarray(rng.random(n), jnp.float32) if "alibi" in given else None,
        softcap=2.0 if "softcap" in given else None,
        scale=0.3,
    )
    q = jnp.asarray(rng.normal(size=(3, rows, n, width)), jnp.float32)
    window = draw(st.sampled_from([None, 1, page_size + 3]))
    return (q, pages, table, jnp.asarray(lengths), window, terms), tokens

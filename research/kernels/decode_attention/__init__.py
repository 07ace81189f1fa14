"""Attention of a few new tokens over a paged cache: one API, one implementation per backend."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.core.errors import UserError
from research.kernels.attention import ScoreTerms
from research.kernels.decode_attention import gpu, tpu, tpu_kernel
from research.kernels.decode_attention.implementations import Implementation, choose, is_supported
from research.kernels.decode_attention.pages import (
    KVPages,
    empty_pages,
    gather,
    in_bits,
    quantize,
    write,
)
from research.kernels.rounding import round_up
from research.parallel.target import platform

__all__ = [
    "PAGE_SIZE",
    "Implementation",
    "KVPages",
    "decode_attention",
    "empty_pages",
    "gather",
    "page_size_fault",
    "pages_for",
    "quantize",
    "stored",
    "takes_pages",
    "write",
]

# Tokens of a page where nothing is said: every implementation takes it.
PAGE_SIZE = 16


def page_size_fault(page_size: int, dtype: str) -> str | None:
    """Returns why this platform's implementation takes no pages of a size, with the nearest that it
    takes; None where it does, or where there is none.

    Args:
      page_size: tokens of a page.
      dtype: of the pages.
    """
    faults = {"tpu": tpu.page_size_fault, "gpu": gpu.page_size_fault}
    fault = faults.get(platform())
    return None if fault is None else fault(page_size, dtype)


def pages_for(
    pages: int, kv_heads: int, head_dim: int, dtype: str, page_size: int = PAGE_SIZE
) -> KVPages:
    """Returns pages of zeros, as wide as this platform's implementation needs them.

    Args:
      pages: how many.
      kv_heads: K.
      head_dim: of the model; that of the pages may be more.
      dtype: as of `empty_pages`.
      page_size: tokens of a page.
    """
    # head_dim 80 -> 80 on CPU, 128 on TPU and on GPU
    units = {"cpu": 1, "tpu": tpu_kernel.LANES, "gpu": gpu.WIDTH}
    unit = units[platform()]
    width = round_up(head_dim, unit)
    return stored(empty_pages(pages, page_size, kv_heads, width, dtype))


def stored(pages: KVPages) -> KVPages:
    """Returns pages as this platform writes them in place: on CPU some types are kept as bits."""
    return in_bits(pages) if platform() == "cpu" else pages


def takes_pages(q: Float[Array, "B T N H"], pages: KVPages, window: int | None) -> bool:
    """Whether this platform's implementation takes a call; arguments as of `decode_attention`.

    CPU takes every type of pages. TPU takes int8 and float8 in pages of 128 tokens and more, Hopper
    in pages of 32 and more, in the wider types only that of the queries; other GPUs take none.
    """
    return is_supported(q, pages, window)


def decode_attention(
    q: Float[Array, "B T N H"],
    pages: KVPages,
    table: Int[Array, "B pages_per_sequence"],
    lengths: Int[Array, "B"],
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    alibi: Float[Array, "N"] | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Array, "B T N H"]:
    """Grouped-query attention of the T newest tokens of each sequence over all of its tokens.

        s = cap(scale · q kᵀ) − alibi · (p_t − p_s)
        out = Σ_visible exp(s) v / (Σ_visible exp(s) + exp(sink))

    with cap(x) = softcap · tanh(x / softcap). Query t has position lengths − T + t and attends to
    the keys from there back to the start of the sequence or of the window. Accumulation and softmax
    are float32. A query of negative position, as in a sequence of length 0, gets zeros. There is no
    gradient.

    Args:
      q: queries of tokens whose keys are in the pages already; N is a multiple of K, and H at most
          that of the pages.
      pages: keys and values; pages outside of the length and the window are not read.
      table: the page of each `page_size` tokens; entries past a sequence's length may be any ids.
      lengths: tokens of each sequence, from 0 to pages_per_sequence · page_size.
      window: how many newest keys a query attends to, its own included; None is all.
      softcap: bound of the scores, above 0; None is no bound.
      sinks: one logit per head that takes part in the denominator only.
      alibi: the slope of each head.
      scale: factor on the scores; None is 1 / √H.
      implementation: the backend; `auto` takes the fastest that supports the call, and never
        `reference`, which gathers the keys and values of all sequences in full length.

    Returns:
      `[B, T, N, H]` in the type of `q`.

    Raises:
      UserError: N is no multiple of K, H is above that of the pages, the window is below 1, the cap
        not above 0, or the implementation does not support the call; the message names the rule and
        the nearest value it allows.

    Source: Kwon et al. 2023 (PagedAttention), arXiv:2309.06180, equation 4.
    """
    _check(q, pages, window)
    width = q.shape[3]
    if scale is None:
        scale = 1.0 / math.sqrt(width)
    terms = ScoreTerms(None, alibi, sinks, softcap, scale)
    # Narrower heads are padded to the width of the pages, and the result cut to theirs.
    padding = pages.head_dim - width
    padded_q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, padding)))
    function = choose(implementation, padded_q, pages, window, terms)
    table = table.astype(jnp.int32)
    lengths = lengths.astype(jnp.int32)
    out = function(padded_q, pages, table, lengths, window, terms)
    return out[..., :width]


def _check(q: Float[Array, "B T N H"], pages: KVPages, window: int | None) -> None:
    heads, width = q.shape[2:]
    if heads % pages.kv_heads:
        raise UserError("num_kv_heads", pages.kv_heads, f"does not divide num_heads = {heads}.")
    if width > pages.head_dim:
        raise UserError(
            "head_dim", width, f"of the queries is above that of the pages, {pages.head_dim}."
        )
    if window is not None and window < 1:
        raise UserError(
            "window", window, "must be at least 1: a query attends at least to its own key."
        )

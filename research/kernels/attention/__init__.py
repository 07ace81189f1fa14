"""Scaled dot-product attention: one API, one implementation per backend."""

import math

from jaxtyping import Array, Float

from research.core.errors import UserError
from research.kernels.attention.implementations import Implementation, choose, for_wide_heads
from research.kernels.attention.key_exchange import KeyExchange
from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms

__all__ = [
    "AttentionMask",
    "Implementation",
    "KeyExchange",
    "ScoreTerms",
    "attention",
    "for_wide_heads",
]

# The exchange that is picked where none is named.
_RING = KeyExchange()


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    mask: AttentionMask,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    alibi: Float[Array, "N"] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "N"] | None = None,
    scale: float | None = None,
    implementation: Implementation = "auto",
    exchange: KeyExchange = _RING,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention of every query over the keys that `mask` lets it attend to.

        s = cap(scale · q kᵀ) + bias − alibi · |p_t − p_s|
        out = Σ_visible exp(s) v / (Σ_visible exp(s) + exp(sink))

    with cap(x) = softcap · tanh(x / softcap) and p the mask's positions. Accumulation and softmax
    are float32; the result has the type of `q`. A query that attends to no key gets zeros, and
    so do its gradients.

    Args:
      q: queries; N is a multiple of K, and query head n reads key/value head n // (N / K).
      k: keys.
      v: values.
      mask: which keys each query attends to.
      bias: added to the scores after the cap; a size of 1 is broadcast. It has a gradient.
      alibi: the slope of each head, a constant: its gradient is zero.
      softcap: bound of the scores, above 0; None is no bound.
      sinks: one logit per head that takes part in the denominator only.
      scale: factor on the scores; None is 1 / √H.
      implementation: the backend; `auto` takes the fastest that supports the call, and never
        `reference`, which holds `[B, N, T, S]` and is taken by name only.

    Raises:
      UserError: N is no multiple of K, q, k and v differ in type, or the implementation does not
        support the call; the message names the rule and the nearest value that it allows.

    Source: Vaswani et al. 2017, arXiv:1706.03762, equation 1; groups: Ainslie et al. 2023,
    arXiv:2305.13245; ALiBi: Press et al. 2021, arXiv:2108.12409; cap: Gemma 2, arXiv:2408.00118,
    section 2; sinks: gpt-oss model card, arXiv:2508.10925, section 2.
    """
    _check_operands(q, k, v)
    batch, queries, _, width = q.shape
    keys = k.shape[1]
    if scale is None:
        scale = 1.0 / math.sqrt(width)

    terms = ScoreTerms(bias, alibi, sinks, softcap, scale)
    # Implementations take positions, and no offsets.
    mask = mask.with_positions(batch, queries, keys)
    function = choose(implementation, q, k, mask, terms, exchange)
    return function(q, k, v, mask, terms)


def _check_operands(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"]
) -> None:
    heads = q.shape[2]
    kv_heads = k.shape[2]
    if heads % kv_heads:
        raise UserError("num_kv_heads", kv_heads, f"does not divide num_heads = {heads}.")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise UserError(f"{name} in {x.dtype.name} must have the type of q, {q.dtype.name}.")

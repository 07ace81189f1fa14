"""Attention written as its equation: it supports every call, and the fast implementations are
tested against it.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from research.kernels.attention.mask import AttentionMask, Span
from research.kernels.attention.terms import ScoreTerms


def unsupported_reason(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], mask: AttentionMask, terms: ScoreTerms
) -> None:
    """Returns None: every call is supported."""


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> Float[Array, "B T N H"]:
    """Attention in float32, holding `[B, N, T, S]`; see the API of the package for the
    equation.
    """
    batch, queries, heads, width = q.shape
    _, keys, kv_heads, _ = k.shape
    # [B, T, N, H] -> [B, T, K, G, H]
    q = q.reshape(batch, queries, kv_heads, heads // kv_heads, width)
    scores = terms.scale * jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    scores = _add_terms(scores, mask, terms)

    # [B, 1, T, S] -> [B, 1, 1, T, S]
    visible = mask.dense(queries, keys)[:, :, None]
    weights = _softmax(scores, visible, terms)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, preferred_element_type=jnp.float32)
    out = out.reshape(batch, queries, heads, width)
    return out.astype(v.dtype)


def _add_terms(
    scores: Float[Array, "B K G T S"], mask: AttentionMask, terms: ScoreTerms
) -> Float[Array, "B K G T S"]:
    """Returns cap(scores) + bias − alibi · |p_t − p_s|."""
    batch, kv_heads, group, queries, keys = scores.shape
    if terms.softcap is not None:
        scores = terms.softcap * jnp.tanh(scores / terms.softcap)

    if terms.bias is not None:
        heads = kv_heads * group
        bias = jnp.broadcast_to(terms.bias, (batch, heads, queries, keys))
        # [B, N, T, S] -> [B, K, G, T, S]
        scores += bias.reshape(scores.shape)

    if terms.alibi is not None:
        slopes = lax.stop_gradient(terms.alibi)
        slopes = _by_head(slopes, kv_heads)
        # [B, 1, T, S] -> [B, 1, 1, T, S]
        distance = mask.distance(Span(0, queries), Span(0, keys))
        scores -= slopes * distance[:, :, None]
    return scores


def _by_head(x: Float[Array, "N"], kv_heads: int) -> Float[Array, "1 K G 1 1"]:
    """Returns one float32 number per head, to be broadcast over scores."""
    x = x.astype(jnp.float32)
    return x.reshape(1, kv_heads, -1, 1, 1)


def _softmax(
    scores: Float[Array, "B K G T S"], visible: Bool[Array, "#B 1 1 T S"], terms: ScoreTerms
) -> Float[Array, "B K G T S"]:
    """Returns exp(s) / (Σ_visible exp(s) + exp(sink)), 0 where a key is hidden."""
    kv_heads = scores.shape[1]
    top = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=jnp.finfo(jnp.float32).min)
    if terms.sinks is not None:
        sinks = _by_head(terms.sinks, kv_heads)
        top = jnp.maximum(top, sinks)
    top = lax.stop_gradient(top)

    # Hidden scores may be above `top`: they are replaced before the exponential, so that no
    # infinity has a gradient.
    shifted = jnp.where(visible, scores - top, 0.0)
    weights = jnp.where(visible, jnp.exp(shifted), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if terms.sinks is not None:
        total += jnp.exp(sinks - top)
    # A query that attends to no key has a total of 0.
    divisor = jnp.where(total > 0, total, 1.0)
    return weights / divisor

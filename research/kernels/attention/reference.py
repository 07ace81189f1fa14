"""Attention written as its equation: the yardstick of every fast implementation, and the one that
takes everything.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask, Span
from research.kernels.attention.terms import ScoreTerms


def unsupported_reason(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], mask: AttentionMask, terms: ScoreTerms
) -> None:
    """Takes everything."""


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
    keys, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    q = q.reshape(batch, queries, kv_heads, group, width)
    scores = terms.scale * jnp.einsum("BTKGH,BSKH->BKGTS", q, k, preferred_element_type=jnp.float32)
    if terms.softcap is not None:
        scores = terms.softcap * jnp.tanh(scores / terms.softcap)
    if terms.bias is not None:
        bias = jnp.broadcast_to(terms.bias, (batch, heads, queries, keys))
        scores += bias.reshape(scores.shape)
    if terms.alibi is not None:
        slopes = (
            jax.lax.stop_gradient(terms.alibi).astype(jnp.float32).reshape(1, kv_heads, group, 1, 1)
        )
        scores -= slopes * mask.distance(Span(0, queries), Span(0, keys))[:, :, None]

    visible = mask.dense(queries, keys)[:, :, None]
    top = jnp.max(scores, axis=-1, keepdims=True, where=visible, initial=jnp.finfo(jnp.float32).min)
    if terms.sinks is not None:
        sinks = terms.sinks.astype(jnp.float32).reshape(1, kv_heads, group, 1, 1)
        top = jnp.maximum(top, sinks)
    top = jax.lax.stop_gradient(top)
    # Hidden scores may lie above `top`: they are replaced before the exponential, so that no
    # infinity has a gradient.
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - top, 0.0)), 0.0)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if terms.sinks is not None:
        total += jnp.exp(sinks - top)
    weights /= jnp.where(total > 0, total, 1.0)
    out = jnp.einsum("BKGTS,BSKH->BTKGH", weights, v, preferred_element_type=jnp.float32)
    return out.reshape(batch, queries, heads, width).astype(v.dtype)

"""Decode attention as attention over the dense cache: it supports every call, and the fast
implementations are tested against it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.attention import AttentionMask, ScoreTerms
from research.kernels.attention import reference as attention
from research.kernels.decode_attention.pages import KVPages, gather


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
    """Decode attention, holding each sequence's keys and values and all scores; see the API of the
    package.
    """
    k, v = gather(pages, table)
    batch, slots, _, _ = k.shape
    positions = jnp.arange(slots)
    positions = positions[None]

    # Slots past the length may hold NaN, and a weight of zero times NaN is NaN.
    written = positions < lengths[:, None]
    written = written[:, :, None, None]
    k = jnp.where(written, k.astype(jnp.float32), 0.0)
    v = jnp.where(written, v.astype(jnp.float32), 0.0)

    # Length 5, T = 2 -> positions [3, 4]
    queries = q.shape[1]
    tokens = jnp.arange(queries)
    q_positions = lengths[:, None] - queries + tokens[None]
    kv_positions = jnp.broadcast_to(positions, (batch, slots))
    mask = AttentionMask(
        causal=True, window=window, q_positions=q_positions, kv_positions=kv_positions
    )
    out = attention.attention(q, k, v, mask, terms)
    return out.astype(q.dtype)

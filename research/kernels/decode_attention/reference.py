"""Decode attention as attention over the dense cache: the yardstick of every fast implementation,
taking everything.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.attention import AttentionMask, ScoreTerms
from research.kernels.attention import reference as attention
from research.kernels.decode_attention.pages import KVPages, gather


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
    """Decode attention, holding each sequence's keys and values and all scores; see the API of the
    package.
    """
    k, v = gather(pages, table)
    positions = jnp.arange(k.shape[1])[None]
    # What lies past the length is anything, which times a weight of zero is not zero.
    written = (positions < lengths[:, None])[:, :, None, None]
    k, v = (jnp.where(written, x.astype(jnp.float32), 0.0) for x in (k, v))
    mask = AttentionMask(
        causal=True,
        window=window,
        q_positions=lengths[:, None] - q.shape[1] + jnp.arange(q.shape[1])[None],
        kv_positions=jnp.broadcast_to(positions, k.shape[:2]),
    )
    return attention.attention(q, k, v, mask, terms).astype(q.dtype)

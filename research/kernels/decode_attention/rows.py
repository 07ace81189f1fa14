"""The rows of a key/value head's matmul: its G query heads times the T new tokens.

Query head g of the group and token t are row g · T + t.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def fold(q: Float[Array, "B T N H"], kv_heads: int) -> Float[Array, "B K rows H"]:
    """Returns the queries by key/value head."""
    batch, queries, heads, width = q.shape
    rows = heads // kv_heads * queries
    # [B, T, N, H] -> [B, N, T, H] -> [B, K, GT, H]
    by_head = jnp.moveaxis(q, 1, 2)
    return by_head.reshape(batch, kv_heads, rows, width)


def unfold(out: Float[Array, "B K rows H"], queries: int) -> Float[Array, "B T N H"]:
    """Returns the result by token: the inverse of `fold`."""
    batch, _, _, width = out.shape
    # [B, K, GT, H] -> [B, N, T, H] -> [B, T, N, H]
    by_head = out.reshape(batch, -1, queries, width)
    return jnp.moveaxis(by_head, 2, 1)


def distance_to_end(queries: int, group: int) -> Int[Array, "rows"]:
    """Returns the sequence's length minus the position of each row."""
    # T = 3, G = 2 -> [3, 2, 1, 3, 2, 1]
    token = jnp.arange(queries, dtype=jnp.int32)
    of_tokens = queries - token
    return jnp.tile(of_tokens, group)


def per_row(of_heads: Float[Array, "N"], kv_heads: int, queries: int) -> Float[Array, "K rows"]:
    """Returns a number of each query head as one of each row, in float32."""
    # K = 1, T = 2: [a, b] -> [[a, a, b, b]]
    of_heads = of_heads.astype(jnp.float32)
    by_kv_head = of_heads.reshape(kv_heads, -1)
    return jnp.repeat(by_kv_head, queries, axis=1)

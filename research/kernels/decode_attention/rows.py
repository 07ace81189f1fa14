"""The rows of a key/value head's matmul: its G query heads times the R newest tokens, row g · R +
r.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def fold(q: Float[Array, "B R N H"], kv_heads: int) -> Float[Array, "B K GR H"]:
    """Returns the queries by key/value head."""
    batch, rows, heads, width = q.shape
    return jnp.moveaxis(q, 1, 2).reshape(batch, kv_heads, heads // kv_heads * rows, width)


def unfold(out: Float[Array, "B K GR H"], rows: int) -> Float[Array, "B R N H"]:
    """Returns the result by token: the inverse of `fold`."""
    batch, _, _, width = out.shape
    return jnp.moveaxis(out.reshape(batch, -1, rows, width), 2, 1)


def behind(rows: int, group: int) -> Int[Array, "GR"]:
    """Returns how far the position of each row lies behind its sequence's length: from 1 to R."""
    return jnp.tile(rows - jnp.arange(rows, dtype=jnp.int32), group)


def by_row(heads: Float[Array, "N"], kv_heads: int, rows: int) -> Float[Array, "K GR"]:
    """Returns a number a query head as one a row, in float32."""
    return jnp.repeat(heads.astype(jnp.float32).reshape(kv_heads, -1), rows, axis=1)

"""The cache of a layer's cross-attention."""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.models.cache_rows import HEADS, lay_out_rows


@flax.struct.dataclass
class MemoryCache:
    """Keys and values of one layer's cross-attention, from the encoder; written once."""

    key: Float[Array, "*L B M K H"]
    value: Float[Array, "*L B M K H"]

    def lay_out(self) -> "MemoryCache":
        """As `TokenCache.lay_out`."""
        key = lay_out_rows(self.key, HEADS)
        value = lay_out_rows(self.value, HEADS)
        return MemoryCache(key, value)

    def take(self, rows: Int[Array, "rows"]) -> "MemoryCache":
        """Returns the memory of `rows`, in this order."""
        # The layer axis comes first where layers are stacked.
        axis = self.key.ndim - 4
        key = jnp.take(self.key, rows, axis=axis, mode="clip")
        value = jnp.take(self.value, rows, axis=axis, mode="clip")
        return MemoryCache(key, value)

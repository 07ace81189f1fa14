"""The cache of a layer's cross-attention."""

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.models.cache_rows import HEADS, lay_out_rows, put_layer, slice_layer


@flax.struct.dataclass
class MemoryCache:
    """Keys and values of one layer's cross-attention, from the encoder; written once.

    Attributes:
      key, value: by row of the memory.
      rows: the row of the memory that each row of the batch reads; None where each has its own.
    """

    key: Float[Array, "*L rows M K H"]
    value: Float[Array, "*L rows M K H"]
    rows: Int[Array, "B"] | None = None

    def lay_out(self) -> "MemoryCache":
        """As `TokenCache.lay_out`."""
        key = lay_out_rows(self.key, HEADS)
        value = lay_out_rows(self.value, HEADS)
        return MemoryCache(key, value, self.rows)

    def layer(self, index: int | Int[Array, ""]) -> "MemoryCache":
        """As `TokenCache.layer`."""
        key, value = slice_layer((self.key, self.value), index)
        return MemoryCache(key, value, self.rows)

    def put(self, index: int | Int[Array, ""], layer: "MemoryCache") -> "MemoryCache":
        """As `TokenCache.put`."""
        if self.rows is not None:
            # Nobody writes what is read by row.
            return self
        return put_layer(self, index, layer)

    def of_batch(self) -> tuple[Float[Array, "B M K H"], Float[Array, "B M K H"]]:
        """Returns keys and values of each row of the batch, of one layer."""
        if self.rows is None:
            return self.key, self.value
        key = jnp.take(self.key, self.rows, axis=0, mode="clip")
        value = jnp.take(self.value, self.rows, axis=0, mode="clip")
        return key, value

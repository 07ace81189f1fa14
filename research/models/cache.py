"""The KV cache: keys and values of the tokens already read, as a pytree."""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.attention import AttentionMask
from research.models.config import ModelConfig


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer; a token of position p stands in slot p.

    Slots after a sequence's newest token hold left-overs (of padding, say). No query sees them, since a query sees
    only slots up to its own position, and they are overwritten before it gets there.
    """

    key: Float[Array, "*L B S K H"]
    value: Float[Array, "*L B S K H"]

    def append(
        self, key: Float[Array, "B T K H"], value: Float[Array, "B T K H"], positions: Int[Array, "B T"]
    ) -> tuple["LayerCache", AttentionMask]:
        """Writes T tokens of consecutive positions; returns the cache and who sees its slots."""
        write = jax.vmap(lambda slots, new, start: jax.lax.dynamic_update_slice_in_dim(slots, new, start, axis=0))
        start = positions[:, 0]
        cache = LayerCache(
            write(self.key, key.astype(self.key.dtype), start),
            write(self.value, value.astype(self.value.dtype), start),
        )
        batch, slots = self.key.shape[:2]
        slot_positions = jnp.broadcast_to(jnp.arange(slots, dtype=positions.dtype), (batch, slots))
        return cache, AttentionMask(causal=True, q_positions=positions, kv_positions=slot_positions)


def empty_cache(config: ModelConfig, batch: int, slots: int, stacked: bool) -> LayerCache | tuple[LayerCache, ...]:
    """Returns a cache of zeros: one `LayerCache` with a leading layer axis where `stacked`, else one a layer."""
    shape = (batch, slots, config.attention.num_kv_heads, config.attention.head_dim)
    if stacked:
        shape = (config.num_layers, *shape)
        return LayerCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
    zeros = [LayerCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))]
    return tuple(zeros * config.num_layers)

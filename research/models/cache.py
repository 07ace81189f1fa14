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

    Attributes:
      key: keys; with latent attention the latents of keys and values, `K` being 1.
      value: values; with latent attention the turned part of the keys.
      memory_key, memory_value: what cross-attention reads of the encoder, written when it is first read; None without
        an encoder.
    """

    key: Float[Array, "*L B S K H"]
    value: Float[Array, "*L B S K J"]
    memory_key: Float[Array, "*L B M heads width"] | None = None
    memory_value: Float[Array, "*L B M heads width"] | None = None

    def append(
        self, key: Float[Array, "B T K H"], value: Float[Array, "B T K J"], positions: Int[Array, "B T"]
    ) -> tuple["LayerCache", AttentionMask]:
        """Writes T tokens of consecutive positions, then padding; returns the cache and who sees its slots."""
        write = jax.vmap(lambda slots, new, start: jax.lax.dynamic_update_slice_in_dim(slots, new, start, axis=0))
        start = positions[:, 0]
        cache = self.replace(
            key=write(self.key, key.astype(self.key.dtype), start),
            value=write(self.value, value.astype(self.value.dtype), start),
        )
        batch, slots = self.key.shape[:2]
        slot_positions = jnp.broadcast_to(jnp.arange(slots, dtype=positions.dtype), (batch, slots))
        return cache, AttentionMask(causal=True, q_positions=positions, kv_positions=slot_positions)


@flax.struct.dataclass
class Cache:
    """What later tokens need of earlier ones.

    Attributes:
      layers: one a layer; of a scanned model, one each of its first layers and then one with a leading layer axis.
      memory_segments: which of the encoder's tokens are real, not 0; None without an encoder.
    """

    layers: tuple[LayerCache, ...]
    memory_segments: Int[Array, "B M"] | None = None

    def take(self, rows: Int[Array, "R"]) -> "Cache":
        """Returns the cache of `rows`, in this order."""
        layers = jax.tree.map(lambda leaf: _pick(leaf, rows, leaf.ndim - 4), self.layers)
        return Cache(layers, None if self.memory_segments is None else _pick(self.memory_segments, rows, 0))

    def reorder(self, rows: Int[Array, "R"]) -> "Cache":
        """Returns the cache of `rows`, where each row has read the same of the encoder as the one that it replaces."""

        def pick(layer: LayerCache) -> LayerCache:
            axis = layer.key.ndim - 4
            return layer.replace(key=_pick(layer.key, rows, axis), value=_pick(layer.value, rows, axis))

        return self.replace(layers=tuple(map(pick, self.layers)))


def _pick(leaf: Array, rows: Int[Array, "R"], axis: int) -> Array:
    return jnp.take(leaf, rows, axis=axis, mode="clip")


def empty_cache(
    config: ModelConfig, batch: int, slots: int, stacked: bool, memory_segments: Int[Array, "B M"] | None = None
) -> Cache:
    """Returns a cache of zeros.

    Args:
      config: the model.
      batch: sequences.
      slots: tokens that it can hold of each.
      stacked: whether layers are scanned.
      memory_segments: of the tokens that the encoder reads, not 0 where they are real, for models that have one.
    """
    c = config.attention
    heads = key = value = (c.num_kv_heads, c.head_dim)
    if c.latent is not None:
        key, value = (1, c.latent.kv_dim), (1, c.latent.rope_dim)

    def zeros(*layers: int) -> LayerCache:
        own = (jnp.zeros((*layers, batch, slots, *shape), config.dtype) for shape in (key, value))
        if memory_segments is None:
            return LayerCache(*own)
        others = (jnp.zeros((*layers, batch, memory_segments.shape[1], *heads), config.dtype) for _ in range(2))
        return LayerCache(*own, *others)

    assert (memory_segments is not None) == (config.structure == "encoder_decoder"), "an encoder needs its segments"
    first = len(config.first_layers) if stacked else config.num_layers
    layers = tuple(zeros() for _ in range(first))
    if stacked and config.num_layers > first:
        layers = (*layers, zeros(config.num_layers - first))
    return Cache(layers, memory_segments)

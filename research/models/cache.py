"""The KV cache: what attention keeps of the tokens that a model has read, as a pytree.

Layers reach it through `attend` alone. Which form it has, and where in it a token lies, is the
cache's business.
"""

from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.attention import AttentionMask
from research.models.config import ModelConfig
from research.models.dot_product import cache_mask
from research.models.paged_cache import PagedCache, PageTable, empty_paged_cache

# Attention over arrays of all slots: what a layer hands to the cache, which knows these arrays.
AttentionFn = Callable[..., Float[Array, "B T N value"]]


class TokenCache(Protocol):
    """What a layer's attention keeps of its own sequence; every form of the cache is one."""

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T *key"],
        v: Float[Array, "B T *value"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B T"],
        page_table: PageTable | None,
        attention: AttentionFn,
    ) -> tuple[Float[Array, "B T N value"], "TokenCache"]:
        """Writes T new tokens, and attends from them to all that is in the cache.

        Args:
          q: queries of the new tokens.
          k, v: what the cache keeps of the new tokens, in the shapes of its own form.
          mask: of the new tokens among themselves; its window and its prefix hold for the cached
              tokens too.
          positions: consecutive in each row, then padding of any position.
          page_table: where the pages of each row lie, for a paged cache; else None.
          attention: of queries over the arrays of all slots, called with (q, keys, values, mask).
        """

    def take(self, rows: Int[Array, "rows"]) -> "TokenCache":
        """Returns the cache of `rows`, in this order; those of a paged cache are its pages."""


def _write(
    slots: Float[Array, "B S *rest"], new: Float[Array, "B T *rest"], start: Int[Array, "B"]
) -> Array:
    """Returns the slots with T tokens written from slot `start` of each row on."""
    write = jax.vmap(
        lambda row, tokens, first: jax.lax.dynamic_update_slice_in_dim(row, tokens, first, axis=0)
    )
    return write(slots, new.astype(slots.dtype), start)


def _pick(leaf: Array, rows: Int[Array, "rows"], axis: int) -> Array:
    return jnp.take(leaf, rows, axis=axis, mode="clip")


@flax.struct.dataclass
class DenseCache:
    """Keys and values of one layer in rows: the token of position p lies in slot p.

    Slots after a sequence's newest token hold left-overs (of padding, say). No query sees them,
    since a query sees only slots up to its own position, and they are overwritten before it gets
    there.
    """

    key: Float[Array, "*L B S K H"]
    value: Float[Array, "*L B S K H"]

    @property
    def slots(self) -> int:
        """Tokens of a row that it can hold, S."""
        return self.key.shape[-3]

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B T"],
        page_table: PageTable | None,
        attention: AttentionFn,
    ) -> tuple[Float[Array, "B T N H"], "DenseCache"]:
        """As of `TokenCache`, with keys and values of all key/value heads."""
        start = positions[:, 0]
        cache = DenseCache(_write(self.key, k, start), _write(self.value, v, start))
        seen = cache_mask(mask, positions, self.slots)
        return attention(q, cache.key, cache.value, seen), cache

    def take(self, rows: Int[Array, "rows"]) -> "DenseCache":
        """Returns the cache of `rows`, in this order."""
        axis = self.key.ndim - 4
        return DenseCache(_pick(self.key, rows, axis), _pick(self.value, rows, axis))


@flax.struct.dataclass
class LatentCache:
    """What latent attention keeps of a token in one layer, in rows as in `DenseCache`.

    Attributes:
      latent: the normalized latent of keys and values, `kv_dim` wide.
      k_rope: the rotary part of the keys, `rope_dim` wide, which all heads share.
    """

    latent: Float[Array, "*L B S latent"]
    k_rope: Float[Array, "*L B S rope"]

    @property
    def slots(self) -> int:
        """Tokens of a row that it can hold, S."""
        return self.latent.shape[-2]

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T latent"],
        v: Float[Array, "B T rope"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B T"],
        page_table: PageTable | None,
        attention: AttentionFn,
    ) -> tuple[Float[Array, "B T N value"], "LatentCache"]:
        """As of `TokenCache`, with latents as `k` and the rotary part of the keys as `v`."""
        start = positions[:, 0]
        cache = LatentCache(_write(self.latent, k, start), _write(self.k_rope, v, start))
        seen = cache_mask(mask, positions, self.slots)
        return attention(q, cache.latent, cache.k_rope, seen), cache

    def take(self, rows: Int[Array, "rows"]) -> "LatentCache":
        """Returns the cache of `rows`, in this order."""
        axis = self.latent.ndim - 3
        return LatentCache(_pick(self.latent, rows, axis), _pick(self.k_rope, rows, axis))


@flax.struct.dataclass
class MemoryCache:
    """Keys and values that one layer's cross-attention reads of the encoder; written once."""

    key: Float[Array, "*L B M K H"]
    value: Float[Array, "*L B M K H"]

    def take(self, rows: Int[Array, "rows"]) -> "MemoryCache":
        """Returns the memory of `rows`, in this order."""
        axis = self.key.ndim - 4
        return MemoryCache(_pick(self.key, rows, axis), _pick(self.value, rows, axis))


@flax.struct.dataclass
class LayerCache:
    """What one layer keeps.

    Attributes:
      tokens: of its own sequence.
      memory: of the encoder's, None without an encoder.
    """

    tokens: DenseCache | LatentCache | PagedCache
    memory: MemoryCache | None = None

    @property
    def slots(self) -> int:
        """Tokens of a row that it can hold, S; a paged cache is asked for its table's."""
        assert not isinstance(self.tokens, PagedCache), "the slots of a paged cache are its table's"
        return self.tokens.slots

    def attend(
        self, q: Array, k: Array, v: Array, **how: Any
    ) -> tuple[Float[Array, "B T N value"], "LayerCache"]:
        """As of `TokenCache`."""
        out, tokens = self.tokens.attend(q, k, v, **how)
        return out, self.replace(tokens=tokens)

    def write_memory(self, k: Float[Array, "B M K H"], v: Float[Array, "B M K H"]) -> "LayerCache":
        """Returns the cache with the encoder's keys and values in it."""
        return self.replace(memory=MemoryCache(k, v))

    def attend_memory(
        self, q: Float[Array, "B T N H"], *, mask: AttentionMask, attention: AttentionFn
    ) -> Float[Array, "B T N H"]:
        """Attends from new tokens to what `write_memory` put there."""
        assert self.memory is not None, "neither an encoder's output nor a cache that holds it"
        return attention(q, self.memory.key, self.memory.value, mask)


@flax.struct.dataclass
class Cache:
    """What later tokens need of earlier ones.

    Attributes:
      layers: one a layer; of a scanned model, one each of its first layers and then one with a
          leading layer axis.
      memory_segments: which of the encoder's tokens are real, not 0; None without an encoder.
      page_table: where the pages of each row lie, in all layers; None where the cache has no pages.
    """

    layers: tuple[LayerCache, ...]
    memory_segments: Int[Array, "B M"] | None = None
    page_table: PageTable | None = None

    @property
    def slots(self) -> int:
        """Tokens of a row that it can hold, S."""
        return self.layers[0].slots if self.page_table is None else self.page_table.slots

    def take(self, rows: Int[Array, "rows"]) -> "Cache":
        """Returns the cache of `rows`, in this order."""
        moved = self.reorder(rows)

        def with_memory(layer: LayerCache) -> LayerCache:
            return layer if layer.memory is None else layer.replace(memory=layer.memory.take(rows))

        layers = tuple(map(with_memory, moved.layers))
        segments = None if self.memory_segments is None else _pick(self.memory_segments, rows, 0)
        return moved.replace(layers=layers, memory_segments=segments)

    def reorder(self, rows: Int[Array, "rows"]) -> "Cache":
        """Returns the cache of `rows`, where each row has read the same of the encoder as the one
        that it replaces.
        """
        page_table, taken = None, rows
        if self.page_table is not None:
            page_table, taken = self.page_table.copy_rows(rows)
        layers = tuple(layer.replace(tokens=layer.tokens.take(taken)) for layer in self.layers)
        return self.replace(layers=layers, page_table=page_table)


def empty_cache(
    config: ModelConfig,
    batch: int,
    slots: int,
    stacked: bool,
    memory_segments: Int[Array, "B M"] | None = None,
    *,
    page_table: PageTable | None = None,
) -> Cache:
    """Returns a cache of zeros.

    Args:
      config: the model.
      batch: sequences.
      slots: tokens that it can hold of each.
      stacked: whether layers are scanned.
      memory_segments: of the tokens that the encoder reads, not 0 where they are real, for models
          that have one.
      page_table: makes it a paged cache, with the places of this table in the place of `slots`.

    Raises:
      UserError: there is a page table, and the model has no paged form.
    """
    assert (memory_segments is not None) == (config.structure == "encoder_decoder"), (
        "an encoder needs its segments"
    )

    def layer(*axes: int) -> LayerCache:
        if page_table is None:
            tokens = _empty_tokens(config, (*axes, batch, slots))
        else:
            tokens = empty_paged_cache(config, page_table, axes)
        if memory_segments is None:
            return LayerCache(tokens)
        heads = (config.attention.num_kv_heads, config.attention.head_dim)
        shape = (*axes, batch, memory_segments.shape[1], *heads)
        return LayerCache(
            tokens, MemoryCache(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))
        )

    first = len(config.first_layers) if stacked else config.num_layers
    layers = [layer() for _ in range(first)]
    if stacked and config.num_layers > first:
        layers.append(layer(config.num_layers - first))
    return Cache(tuple(layers), memory_segments, page_table)


def _empty_tokens(config: ModelConfig, rows: tuple[int, ...]) -> DenseCache | LatentCache:
    """Returns a layer's cache of zeros for its own sequence; `rows` are its axes before those of a
    token.
    """
    c = config.attention
    if c.latent is not None:
        widths = (c.latent.kv_dim, c.latent.rope_dim)
        return LatentCache(*(jnp.zeros((*rows, width), config.dtype) for width in widths))
    heads = (c.num_kv_heads, c.head_dim)
    return DenseCache(*(jnp.zeros((*rows, *heads), config.dtype) for _ in range(2)))

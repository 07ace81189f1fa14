"""The KV cache: keys and values of earlier tokens, as a pytree.

Layers use it through `attend` alone and do not know whether it is dense, latent or paged.
"""

from collections.abc import Callable
from typing import Any, Protocol

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.core.errors import UserError
from research.kernels.attention import AttentionMask
from research.models.cache_rows import HEADS, lay_out_rows, put_layer, slice_layer, write_tokens
from research.models.config import LayerConfig, ModelConfig
from research.models.dot_product import cache_mask
from research.models.latent_cache import LatentCache, PagedLatentCache, empty_latent_pages
from research.models.memory_cache import MemoryCache
from research.models.paged_cache import PagedCache, PageTable, empty_paged_cache

# The types that pages may have whatever the model's.
CACHE_DTYPES = ("float32", "bfloat16", "int8", "float8_e4m3fn")
# Attention over arrays of all slots: a layer passes it to the cache, which has these arrays.
AttentionFn = Callable[..., Float[Array, "B T N value"]]


class TokenCache(Protocol):
    """The cache of a layer's self-attention: the interface of its dense, latent and paged forms."""

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
          k, v: what the cache keeps of the new tokens, in the shapes of its form.
          mask: of the new tokens among themselves; its window and its prefix hold for the cached
              tokens too.
          positions: consecutive in each row, then padding of any position.
          page_table: the pages of each row, for a paged cache; else None.
          attention: of queries over the arrays of all slots, called with (q, keys, values, mask).
        """

    def lay_out(self) -> "TokenCache":
        """Returns the cache with its arrays where the mesh in context has their rows and heads."""

    def layer(self, index: int | Int[Array, ""]) -> "TokenCache":
        """Returns the cache of one layer, of a cache of stacked ones."""

    def put(self, index: int | Int[Array, ""], layer: "TokenCache") -> "TokenCache":
        """Returns a cache of stacked layers with what one layer has made of `layer(index)`."""


@flax.struct.dataclass
class DenseCache:
    """Keys and values of one layer in rows: the token of position p lies in slot p.

    Slots after a sequence's newest token may hold anything, such as keys of padding. The mask hides
    them: a query attends to slots up to its own position, and a slot is overwritten before that
    position is reached.
    """

    key: Float[Array, "*L B S K H"]
    value: Float[Array, "*L B S K H"]

    @property
    def slots(self) -> int:
        """Tokens of a row that it can hold, S."""
        return self.key.shape[-3]

    def lay_out(self) -> "DenseCache":
        """As `TokenCache.lay_out`."""
        return DenseCache(lay_out_rows(self.key, HEADS), lay_out_rows(self.value, HEADS))

    def layer(self, index: int | Int[Array, ""]) -> "DenseCache":
        """As `TokenCache.layer`."""
        return slice_layer(self, index)

    def put(self, index: int | Int[Array, ""], layer: "DenseCache") -> "DenseCache":
        """As `TokenCache.put`."""
        return put_layer(self, index, layer)

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
        """As `TokenCache.attend`, with keys and values of all key/value heads."""
        start = positions[:, 0]
        key = write_tokens(self.key, k, start, HEADS)
        value = write_tokens(self.value, v, start, HEADS)
        slots_mask = cache_mask(mask, positions, self.slots)
        return attention(q, key, value, slots_mask), DenseCache(key, value)


@flax.struct.dataclass
class LayerCache:
    """The cache of one layer.

    Attributes:
      tokens: of self-attention.
      memory: of cross-attention, None without an encoder.
    """

    tokens: DenseCache | LatentCache | PagedCache | PagedLatentCache
    memory: MemoryCache | None = None

    def attend(
        self, q: Array, k: Array, v: Array, **how: Any
    ) -> tuple[Float[Array, "B T N value"], "LayerCache"]:
        """As `TokenCache.attend`."""
        out, tokens = self.tokens.attend(q, k, v, **how)
        return out, self.replace(tokens=tokens)

    def lay_out(self) -> "LayerCache":
        """As `TokenCache.lay_out`."""
        memory = None if self.memory is None else self.memory.lay_out()
        return LayerCache(self.tokens.lay_out(), memory)

    def layer(self, index: int | Int[Array, ""]) -> "LayerCache":
        """As `TokenCache.layer`."""
        memory = None if self.memory is None else self.memory.layer(index)
        return LayerCache(self.tokens.layer(index), memory)

    def put(self, index: int | Int[Array, ""], layer: "LayerCache") -> "LayerCache":
        """As `TokenCache.put`."""
        memory = None if self.memory is None else self.memory.put(index, layer.memory)
        return LayerCache(self.tokens.put(index, layer.tokens), memory)

    def write_memory(self, k: Float[Array, "B M K H"], v: Float[Array, "B M K H"]) -> "LayerCache":
        """Returns the cache with the encoder's keys and values in it."""
        return self.replace(memory=MemoryCache(k, v).lay_out())

    def attend_memory(
        self, q: Float[Array, "B T N H"], *, mask: AttentionMask, attention: AttentionFn
    ) -> Float[Array, "B T N H"]:
        """Attends from new tokens to what `write_memory` put there."""
        assert self.memory is not None, "neither the encoder's hidden states nor a cache of them"
        return attention(q, *self.memory.of_batch(), mask)


@flax.struct.dataclass
class Cache:
    """The caches of all layers.

    Attributes:
      layers: one per layer; of a scanned model, one for each of its first layers, then one for
          each place of the pattern, with a leading axis of the layers there.
      memory_segments: which of the encoder's tokens are real, not 0; None without an encoder.
      page_table: the pages of each row; None where the cache is not paged.
    """

    layers: tuple[LayerCache, ...]
    memory_segments: Int[Array, "B M"] | None = None
    page_table: PageTable | None = None

    @property
    def slots(self) -> int:
        """Tokens of a row that it can hold, S."""
        if self.page_table is not None:
            return self.page_table.slots
        return self.layers[0].tokens.slots

    def lay_out(self) -> "Cache":
        """As `TokenCache.lay_out`."""
        return self.replace(layers=tuple(layer.lay_out() for layer in self.layers))


def empty_cache(
    config: ModelConfig,
    batch: int,
    slots: int,
    stacked: bool,
    memory_segments: Int[Array, "B M"] | None = None,
    *,
    page_table: PageTable | None = None,
    cache_dtype: str | None = None,
) -> Cache:
    """Returns a cache of zeros.

    Args:
      config: the model.
      batch: sequences.
      slots: tokens that it can hold of each.
      stacked: whether layers are scanned.
      memory_segments: of the tokens that the encoder reads, not 0 where they are real, for models
          that have one.
      page_table: makes it a paged cache, whose table has the slots.
      cache_dtype: of the pages, one of `CACHE_DTYPES`; None is the model's own type. Numbers of
          int8 and float8_e4m3fn have a float32 scale for each token and head, and for each token's
          latent. What cross-attention reads has the model's type.

    Raises:
      UserError: another type, or one for a cache that is not paged.
    """
    pages_dtype = _pages_dtype(config, page_table, cache_dtype)
    assert (memory_segments is not None) == (config.structure == "encoder_decoder"), (
        "an encoder needs its segments"
    )

    c = config.attention

    def empty_layer(layer: LayerConfig, *layer_axis: int) -> LayerCache:
        if page_table is None:
            tokens = _empty_tokens(config, (*layer_axis, batch, slots))
        else:
            make = empty_paged_cache if c.latent is None else empty_latent_pages
            kind = page_table.kind_of(layer.window)
            tokens = make(config, page_table, kind, layer_axis, pages_dtype)
        memory = None
        if memory_segments is not None:
            encoder_length = memory_segments.shape[1]
            shape = (*layer_axis, batch, encoder_length, c.num_kv_heads, c.head_dim)
            key = jnp.zeros(shape, config.dtype)
            value = jnp.zeros(shape, config.dtype)
            memory = MemoryCache(key, value)
        return LayerCache(tokens, memory)

    num_unrolled = len(config.first_layers) if stacked else config.num_layers
    layers = [empty_layer(layer) for layer in config.layers()[:num_unrolled]]
    # Stacked, the layers at a place of the pattern share a cache: of 7 layers, 2 of them first, and
    # a pattern of 3 -> 2 caches, then those of layers 2 and 5, of 3 and 6, and of 4.
    num_stacked = config.num_layers - num_unrolled
    period = len(config.pattern)
    for place, layer in enumerate(config.pattern[:num_stacked]):
        at_place = range(place, num_stacked, period)
        layers.append(empty_layer(layer, len(at_place)))
    return Cache(tuple(layers), memory_segments, page_table).lay_out()


def _pages_dtype(config: ModelConfig, page_table: PageTable | None, cache_dtype: str | None) -> str:
    """Returns the type of pages."""
    if cache_dtype is None:
        return config.dtype
    if cache_dtype not in CACHE_DTYPES:
        raise UserError("cache_dtype", cache_dtype, f"is not one of {', '.join(CACHE_DTYPES)}.")
    if page_table is None:
        raise UserError(
            "cache_dtype", cache_dtype, "is a type of pages: a cache in rows has the model's."
        )
    return cache_dtype


def _empty_tokens(config: ModelConfig, rows: tuple[int, ...]) -> DenseCache | LatentCache:
    """Returns a cache of zeros for self-attention; `rows` are its axes before those of a token."""
    c = config.attention
    if c.latent is not None:
        latent = jnp.zeros((*rows, c.latent.kv_dim), config.dtype)
        k_rope = jnp.zeros((*rows, c.latent.rope_dim), config.dtype)
        return LatentCache(latent, k_rope)

    shape = (*rows, c.num_kv_heads, c.head_dim)
    key = jnp.zeros(shape, config.dtype)
    value = jnp.zeros(shape, config.dtype)
    return DenseCache(key, value)

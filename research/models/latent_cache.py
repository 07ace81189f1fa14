"""The cache of a layer with latent attention, in rows and in pages."""

from collections.abc import Callable

import flax.struct
import jax
from jaxtyping import Array, Float, Int

from research.kernels.attention import AttentionMask
from research.kernels.decode_attention import KVPages, empty_pages, stored, write
from research.models.cache_rows import lay_out_rows, put_layer, slice_layer, write_tokens
from research.models.config import ModelConfig
from research.models.dot_product import cache_mask
from research.models.paged_cache import (
    PageTable,
    by_layer,
    copy_pages,
    gather_visible,
    ids_in_pool,
    one_pool,
    stack_pages,
)
from research.parallel.rules import constrain

# The logical axes of a layer's latents, which belong to all heads.
LATENTS = ("batch", None, "latent")


@flax.struct.dataclass
class LatentCache:
    """Latents and rotary keys of one layer with latent attention, in rows as in `DenseCache`.

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

    def lay_out(self) -> "LatentCache":
        """As `TokenCache.lay_out`."""
        latent = lay_out_rows(self.latent, LATENTS)
        k_rope = lay_out_rows(self.k_rope, LATENTS)
        return LatentCache(latent, k_rope)

    def layer(self, index: int | Int[Array, ""]) -> "LatentCache":
        """As `TokenCache.layer`."""
        return slice_layer(self, index)

    def put(self, index: int | Int[Array, ""], layer: "LatentCache") -> "LatentCache":
        """As `TokenCache.put`."""
        return put_layer(self, index, layer)

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T latent"],
        v: Float[Array, "B T rope"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B T"],
        page_table: PageTable | None,
        attention: Callable[..., Float[Array, "B T N value"]],
    ) -> tuple[Float[Array, "B T N value"], "LatentCache"]:
        """As `TokenCache.attend`, with latents as `k` and the rotary part of the keys as `v`."""
        start = positions[:, 0]
        latent = write_tokens(self.latent, k, start, LATENTS)
        k_rope = write_tokens(self.k_rope, v, start, LATENTS)
        slots_mask = cache_mask(mask, positions, self.slots)
        return attention(q, latent, k_rope, slots_mask), LatentCache(latent, k_rope)


@flax.struct.dataclass
class PagedLatentCache:
    """Latents and rotary keys of one layer in pages, as keys and values of a single head.

    They are gathered for each call: kernels over pages take heads of one width.

    Attributes:
      pages, first_page, kind: as of `PagedCache`.
    """

    pages: KVPages
    first_page: Int[Array, ""] | None = None
    kind: int = flax.struct.field(pytree_node=False, default=0)

    def lay_out(self) -> "PagedLatentCache":
        """As `TokenCache.lay_out`: they belong to all heads, and pages to all rows."""
        return self.replace(pages=jax.tree.map(_replicate, self.pages))

    def layer(self, index: int | Int[Array, ""]) -> "PagedLatentCache":
        """As `PagedCache.layer`."""
        return PagedLatentCache(*one_pool(self.pages, index), self.kind)

    def put(self, index: int | Int[Array, ""], layer: "PagedLatentCache") -> "PagedLatentCache":
        """As `PagedCache.put`."""
        return self.replace(pages=by_layer(layer.pages, self.pages))

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T latent"],
        v: Float[Array, "B T rope"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B T"],
        page_table: PageTable | None,
        attention: Callable[..., Float[Array, "B T N value"]],
    ) -> tuple[Float[Array, "B T N value"], "PagedLatentCache"]:
        """As `LatentCache.attend`."""
        assert page_table is not None, "a paged cache needs its table"
        page_table = page_table.kinds[self.kind]
        start = positions[:, 0]
        # [B, T, latent] -> [B, T, 1, latent]: one head.
        k = _replicate(k[:, :, None])
        v = _replicate(v[:, :, None])
        ids = ids_in_pool(page_table, self.first_page)
        pages = write(self.pages, ids, start, k, v)
        gathered = gather_visible(pages, ids, positions, mask.window)
        # [B, S, 1, latent] -> [B, S, latent], in the model's type
        latent, k_rope = (x[:, :, 0].astype(k.dtype) for x in gathered)
        slots_mask = cache_mask(mask, positions, page_table.slots)
        out = attention(q, latent, k_rope, slots_mask)
        return out, PagedLatentCache(pages, kind=self.kind)

    def copy(
        self, sources: Int[Array, "pages"], targets: Int[Array, "pages"]
    ) -> "PagedLatentCache":
        """As `PagedCache.copy`; every device has pages of all rows."""
        return self.replace(pages=copy_pages(self.pages, sources, targets))


def _replicate(leaf: Array) -> Array:
    return constrain(leaf, (None,) * leaf.ndim)


def empty_latent_pages(
    config: ModelConfig, page_table: PageTable, kind: int, stack: tuple[int, ...], dtype: str
) -> PagedLatentCache:
    """Returns a layer's pages of zeros, or those of a stack of layers, in a type of pages."""
    latent = config.attention.latent
    assert latent is not None
    # Latents and rotary keys have a scale each.
    pages = empty_pages(
        page_table.kinds[kind].num_pages,
        page_table.page_size,
        1,
        latent.kv_dim,
        dtype,
        value_dim=latent.rope_dim,
    )
    return PagedLatentCache(stack_pages(stored(pages), stack), kind=kind)

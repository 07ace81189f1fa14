"""The paged KV cache: keys and values of all rows in the pages of one pool, found through a table.

A row takes the pages that its own length needs, so rows of different lengths share the pool.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from research.kernels.attention import AttentionMask
from research.kernels.decode_attention import PAGE_SIZE, KVPages, gather, pages_for, write
from research.kernels.rounding import round_up
from research.models.config import ModelConfig
from research.models.dot_product import DotProduct, cache_mask
from research.parallel.rules import constrain


@flax.struct.dataclass
class PageTable:
    """Which page holds which tokens: that of position p of row b is in page
    `ids[b, p // page_size]`, slot `p % page_size`.

    Every id is a page of the pool. Page 0 belongs to no row: it fills the entries that a row does
    not need, and padding and what comes after a row's end are written there.

    Attributes:
      ids: of the pages.
      num_pages: of the pool, page 0 included.
      page_size: tokens of a page.
      windowed: the same of layers with a window, where these have a pool of their own: they need no
        pages before it. None where all layers have one pool.
    """

    ids: Int[Array, "B pages_per_row"]
    num_pages: int = flax.struct.field(pytree_node=False)
    page_size: int = flax.struct.field(pytree_node=False)
    windowed: "PageTable | None" = None

    @classmethod
    def of_kinds(
        cls,
        ids: Sequence[Int[Array, "B pages_per_row"]],
        num_pages: Sequence[int],
        page_size: int,
    ) -> "PageTable":
        """Returns a table.

        Args:
          ids: of all layers; or of those without a window, then of those with one.
          num_pages: of the pools.
          page_size: tokens of a page.
        """
        first, *others = [cls(*each, page_size) for each in zip(ids, num_pages, strict=True)]
        if not others:
            return first
        [windowed] = others
        return first.replace(windowed=windowed)

    @property
    def kinds(self) -> tuple["PageTable", ...]:
        """The table of each pool. The cache of a layer says which is its own."""
        if self.windowed is None:
            return (self,)
        return (self.replace(windowed=None), self.windowed)

    def kind_of(self, window: int | None) -> int:
        """Returns which of `kinds` is that of a layer with a window, or without one."""
        return 0 if window is None else len(self.kinds) - 1

    def of_rows(self, rows: Int[Array, "rows"]) -> "PageTable":
        """Returns the table of some of its rows; a row that does not exist has no pages."""

        def take(ids: Array) -> Array:
            return ids.at[rows].get(mode="fill", fill_value=0)

        return jax.tree.map(take, self)

    @property
    def slots(self) -> int:
        """Tokens of a row that the table has entries for, S."""
        return self.ids.shape[1] * self.page_size


def contiguous_table(tokens: Sequence[int], slots: int) -> PageTable:
    """Returns a table in which the pages of a row are consecutive.

    Args:
      tokens: of each row, the most that it may hold.
      slots: of a row in the table, in tokens: at least the maximum of `tokens`.
    """
    pages_per_row = -(-slots // PAGE_SIZE)
    ids = np.zeros((len(tokens), pages_per_row), np.int32)
    next_page = 1
    # Rows that need [2, 1] pages of 3 -> [[1, 2, 0], [3, 0, 0]]
    for row, count in enumerate(tokens):
        needed = -(-count // PAGE_SIZE)
        ids[row, :needed] = np.arange(next_page, next_page + needed)
        next_page += needed
    # A multiple of a row's pages, so that few sizes of pools are compiled.
    pool_pages = round_up(next_page - 1, pages_per_row)
    return PageTable(jnp.asarray(ids), 1 + pool_pages, PAGE_SIZE)


@flax.struct.dataclass
class PagedCache:
    """Keys and values of one layer in pages; the table, which layers share, comes with each call.

    Attributes:
      pages: of the layer.
      first_page: where the pages are those of several layers, the index of this layer's page 0.
      kind: which of `PageTable.kinds` says where its tokens are.
    """

    pages: KVPages
    first_page: Int[Array, ""] | None = None
    kind: int = flax.struct.field(pytree_node=False, default=0)

    def lay_out(self) -> "PagedCache":
        """As `TokenCache.lay_out`: page ids mean the same on every device, so only heads are
        sharded.
        """

        def by_head(leaf: Array) -> Array:
            # Pages [pages, K, slots, H] and scales [pages, K, slots], both maybe stacked.
            is_scale = leaf.ndim < self.pages.key.ndim
            stack = [None] * stack_axes(self.pages)
            slots = [None] if is_scale else [None, None]
            return constrain(leaf, (*stack, None, "kv_heads", *slots))

        return self.replace(pages=jax.tree.map(by_head, self.pages))

    def layer(self, index: int | Int[Array, ""]) -> "PagedCache":
        """As `TokenCache.layer`: no page is copied."""
        return PagedCache(*one_pool(self.pages, index), self.kind)

    def put(self, index: int | Int[Array, ""], layer: "PagedCache") -> "PagedCache":
        """As `TokenCache.put`; the other layers' pages are in the layer's pool too."""
        return self.replace(pages=by_layer(layer.pages, self.pages))

    def attend(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B T K H"],
        v: Float[Array, "B T K H"],
        *,
        mask: AttentionMask,
        positions: Int[Array, "B T"],
        page_table: PageTable | None,
        attention: DotProduct,
    ) -> tuple[Float[Array, "B T N H"], "PagedCache"]:
        """As `TokenCache.attend`, with keys and values of all key/value heads.

        One new token per row goes through decode attention, which reads the pages in place. More
        are a prompt: the pages of their rows are gathered for the attention of training, as they
        are where scores have a bias, or where the platform's decode attention does not take pages
        of this type.
        """
        assert page_table is not None, "a paged cache needs its table"
        page_table = page_table.kinds[self.kind]
        start = positions[:, 0]
        # All devices write the tokens of all rows, each of its own heads.
        by_head = (None, None, "kv_heads", "head")
        k = constrain(k, by_head)
        v = constrain(v, by_head)
        ids = ids_in_pool(page_table, self.first_page)
        pages = write(self.pages, ids, start, k, v)
        is_step = q.shape[1] == 1 and mask.prefix is None
        if is_step and attention.takes_pages(q, pages, mask.window):
            # The positions of a finished row may pass its last slot. What it reads is not used, but
            # must exist. A row without pages reads nothing.
            lengths = jnp.minimum(start + 1, page_table.slots)
            has_pages = jnp.max(page_table.ids, axis=1) > 0
            lengths = jnp.where(has_pages, lengths, 0)
            out = attention.over_pages(q, pages, ids, lengths, mask.window)
            return out, PagedCache(pages, kind=self.kind)
        # Pages may be wider than the heads, which then end in zeros, and of another type.
        gathered = gather_visible(pages, ids, positions, mask.window)
        keys, values = (x[..., : k.shape[3]].astype(k.dtype) for x in gathered)
        slots_mask = cache_mask(mask, positions, page_table.slots)
        return attention(q, keys, values, slots_mask), PagedCache(pages, kind=self.kind)

    def copy(self, sources: Int[Array, "pages"], targets: Int[Array, "pages"]) -> "PagedCache":
        """Returns the cache with pages copied to others."""
        return self.replace(pages=copy_pages(self.pages, sources, targets))


def gather_visible(
    pages: KVPages,
    ids: Int[Array, "B pages_per_row"],
    positions: Int[Array, "B T"],
    window: int | None,
) -> tuple[Float[Array, "B S K H"], Float[Array, "B S K value"]]:
    """Returns what `gather` does, with zeros where no new token of the row may attend to.

    What other requests left in these slots may be NaN, and a weight of zero times NaN is NaN.

    Args:
      pages: with the new tokens in them.
      ids: of each row's pages.
      positions: of the new tokens; padding has position 0.
      window: of the layer, or None.
    """
    keys, values = gather(pages, ids)
    slots = jnp.arange(keys.shape[1])
    slots = slots[None]
    # The newest token at position 5 attends to slots 0 to 5, with a window of 4 to slots 2 to 5.
    visible = slots <= jnp.max(positions, axis=1, keepdims=True)
    if window is not None:
        visible &= slots > jnp.min(positions, axis=1, keepdims=True) - window
    return zero_hidden(keys, visible), zero_hidden(values, visible)


def zero_hidden(x: Float[Array, "B S K H"], visible: Bool[Array, "B S"]) -> Float[Array, "B S K H"]:
    """Returns what slots hold, zeros in those that are not visible."""
    zero = jnp.zeros((), x.dtype)
    return jnp.where(visible[:, :, None, None], x, zero)


def one_pool(pages: KVPages, index: int | Int[Array, ""]) -> tuple[KVPages, Int[Array, ""]]:
    """Returns the pages of stacked layers as those of one layer, and the index of page 0 of layer
    `index` among them.

    So a layer is read and written in place: a slice of its pages would be a copy.
    """
    num_pages = pages.key.shape[1]

    def merge(leaf: Array) -> Array:
        # [L, pages, K, slots, H] -> [L · pages, K, slots, H]
        return leaf.reshape(-1, *leaf.shape[2:])

    return jax.tree.map(merge, pages), jnp.asarray(index * num_pages, jnp.int32)


def by_layer(pool: KVPages, stacked: KVPages) -> KVPages:
    """Returns pages from `one_pool` in the shapes of stacked layers."""
    return jax.tree.map(lambda leaf, like: leaf.reshape(like.shape), pool, stacked)


def ids_in_pool(
    page_table: PageTable, first_page: Int[Array, ""] | None
) -> Int[Array, "B pages_per_row"]:
    """Returns the table's ids, counted from a layer's page 0 in the pages of all layers."""
    if first_page is None:
        return page_table.ids
    return page_table.ids + first_page


def stack_axes(pages: KVPages) -> int:
    """Returns how many axes come before that of the pages: 1 where layers are stacked, else 0."""
    return pages.key.ndim - 4


def copy_pages(
    pages: KVPages, sources: Int[Array, "copies"], targets: Int[Array, "copies"]
) -> KVPages:
    """Returns pages, some of which are copied to others."""
    axis = stack_axes(pages)
    stack = (slice(None),) * axis

    def copy(leaf: Array) -> Array:
        copied = jnp.take(leaf, sources, axis=axis, mode="clip")
        return leaf.at[(*stack, targets)].set(copied)

    return jax.tree.map(copy, pages)


def empty_paged_cache(
    config: ModelConfig, page_table: PageTable, kind: int, stack: tuple[int, ...], dtype: str
) -> PagedCache:
    """Returns a layer's pages of zeros, or those of a stack of layers, in a type of pages."""
    c = config.attention
    num_pages = page_table.kinds[kind].num_pages
    pages = pages_for(num_pages, c.num_kv_heads, c.head_dim, dtype, page_table.page_size)
    return PagedCache(stack_pages(pages, stack), kind=kind)


def stack_pages(pages: KVPages, stack: tuple[int, ...]) -> KVPages:
    """Returns pages of zeros like these, for a stack of layers."""

    def zeros(leaf: Array) -> Array:
        return jnp.zeros((*stack, *leaf.shape), leaf.dtype)

    return jax.tree.map(zeros, pages)

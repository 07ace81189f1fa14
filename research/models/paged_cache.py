"""The paged KV cache: keys and values of all rows in the pages of one pool, found through a table.

A row takes the pages that its own length needs, so rows of different lengths share the pool.
"""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.core.errors import UserError
from research.kernels.attention import AttentionMask
from research.kernels.decode_attention import PAGE_SIZE, KVPages, gather, pages_for, write
from research.kernels.rounding import round_up
from research.models.config import ModelConfig
from research.models.dot_product import DotProduct, cache_mask


@flax.struct.dataclass
class PageTable:
    """Which page holds which tokens: that of position p of row b lies in page `ids[b, p // C]`,
    slot `p % C`.

    All ids are pages that there are. Page 0 belongs to no row: it stands in the places that a row
    does not need, and padding is written there, and whatever comes after a row's end.

    Attributes:
      ids: of the pages.
      num_pages: of the pool, page 0 included.
      page_size: C, tokens of a page.
    """

    ids: Int[Array, "B pages_per_row"]
    num_pages: int = flax.struct.field(pytree_node=False)
    page_size: int = flax.struct.field(pytree_node=False)

    @property
    def slots(self) -> int:
        """Tokens of a row that the table has places for, S."""
        return self.ids.shape[1] * self.page_size

    def copy_rows(self, rows: Int[Array, "rows"]) -> tuple["PageTable", Int[Array, "pages"]]:
        """Returns a table in which each of `rows` has pages of its own, and the old page that each
        new one copies.
        """
        places = self.ids.shape[1]
        count = rows.shape[0] * places
        ids = 1 + jnp.arange(count, dtype=jnp.int32).reshape(rows.shape[0], places)
        # [rows, pages a row] -> [1 + rows · pages a row]: new page 1 + r · places + j copies the
        # j-th page of rows[r].
        sources = self.ids.at[rows].get(mode="clip").reshape(-1)
        return PageTable(ids, 1 + count, self.page_size), jnp.pad(sources, (1, 0))


def contiguous_table(tokens: Sequence[int], slots: int) -> PageTable:
    """Returns a table in which the pages of a row follow each other.

    Args:
      tokens: of each row, those that it may come to hold.
      slots: the places of a row in the table, in tokens: at least the most of `tokens`.
    """
    places = -(-slots // PAGE_SIZE)
    ids = np.zeros((len(tokens), places), np.int32)
    free = 1
    for row, count in enumerate(tokens):
        needed = -(-count // PAGE_SIZE)
        ids[row, :needed] = np.arange(free, free + needed)
        free += needed
    # Whole rows, so that few sizes of pools are compiled.
    return PageTable(jnp.asarray(ids), 1 + round_up(free - 1, places), PAGE_SIZE)


def paged_unsupported_reason(config: ModelConfig) -> str | None:
    """Returns what keeps a model from a paged cache, or None."""
    if config.attention.latent is not None:
        return "attention.latent caches latents, and pages hold keys and values of heads"
    if config.position.kind in ("buckets", "relative", "alibi_bfloat16"):
        return (
            f"position.kind = {config.position.kind!r} adds a bias to the scores, which "
            "attention over pages lacks"
        )
    return None


@flax.struct.dataclass
class PagedCache:
    """Keys and values of one layer in pages; the table, which all layers share, comes with each
    call.
    """

    pages: KVPages

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
        """As of `TokenCache`, with keys and values of all key/value heads.

        One new token a row goes through decode attention, which reads the pages where they lie.
        More are a prompt: their rows' pages are gathered for the attention of training.
        """
        assert page_table is not None, "a paged cache needs its table"
        start = positions[:, 0]
        pages = write(self.pages, page_table.ids, start, k, v)
        if q.shape[1] == 1 and mask.prefix is None:
            # A row that has ended counts on past its last slot. What it reads no longer matters,
            # but must exist.
            lengths = jnp.minimum(start + 1, page_table.slots)
            out = attention.over_pages(q, pages, page_table.ids, lengths, mask.window)
            return out, PagedCache(pages)
        # Pages may be wider than the heads, which then end in zeros.
        keys, values = (x[..., : k.shape[3]] for x in gather(pages, page_table.ids))
        return attention(
            q, keys, values, cache_mask(mask, positions, page_table.slots)
        ), PagedCache(pages)

    def take(self, pages: Int[Array, "pages"]) -> "PagedCache":
        """Returns the cache of `pages`, in this order."""
        axis = self.pages.key.ndim - 4  # 1 where layers are stacked
        return PagedCache(
            jax.tree.map(lambda leaf: jnp.take(leaf, pages, axis=axis, mode="clip"), self.pages)
        )


def empty_paged_cache(
    config: ModelConfig, page_table: PageTable, stack: tuple[int, ...]
) -> PagedCache:
    """Returns a layer's pages of zeros, or those of a stack of layers.

    Raises:
      UserError: the model has no paged form.
    """
    reason = paged_unsupported_reason(config)
    if reason is not None:
        raise UserError(
            "cache", "paged", f"is not possible for this model: {reason}. Use cache = 'dense'."
        )
    c = config.attention
    pages = pages_for(page_table.num_pages, c.num_kv_heads, c.head_dim, config.dtype)
    return PagedCache(
        jax.tree.map(lambda leaf: jnp.zeros((*stack, *leaf.shape), leaf.dtype), pages)
    )

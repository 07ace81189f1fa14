"""The cache of a layer with latent attention."""

from collections.abc import Callable

import flax.struct
from jaxtyping import Array, Float, Int

from research.kernels.attention import AttentionMask
from research.models.cache_rows import lay_out_rows, write_tokens
from research.models.dot_product import cache_mask
from research.models.paged_cache import PageTable
from research.parallel.shard_map import take_rows

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

    def take(self, rows: Int[Array, "rows"], groups: int = 1) -> "LatentCache":
        """As `TokenCache.take`."""
        # The layer axis comes first where layers are stacked.
        axis = self.latent.ndim - 3
        latent = take_rows(self.latent, rows, axis, groups)
        k_rope = take_rows(self.k_rope, rows, axis, groups)
        return LatentCache(latent, k_rope)

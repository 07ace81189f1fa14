"""The inputs that all layers of a stack share."""

import dataclasses

from jaxtyping import Array, Float, Int, Key, Shaped

from research.core.trees import node
from research.kernels.attention import AttentionMask
from research.models.paged_cache import PageTable


@node(static=("slots",))
@dataclasses.dataclass(frozen=True)
class Context:
    """What each layer of a stack gets beside the hidden states and its cache.

    Attributes:
      positions: of each token in its document.
      mask: the attention mask, without a layer's window.
      lengths: of each token's document, for RoPE scaling rules that depend on it.
      bias: added to the scores of every layer, or None.
      memory: the encoder's last hidden states; None where there is no encoder, or the cache holds
          their keys and values.
      memory_mask: the mask of cross-attention.
      page_table: the pages of each row, for a paged cache.
      slots: tokens that a row of the cache can hold, S; None without a cache.
      key: of the layers' dropout; None drops nothing.
    """

    positions: Int[Array, "B T"]
    mask: AttentionMask
    lengths: Int[Array, "B T"] | None = None
    bias: Float[Array, "#B N #T S"] | None = None
    memory: Float[Array, "B M D"] | None = None
    memory_mask: AttentionMask | None = None
    page_table: PageTable | None = None
    slots: int | None = None
    key: Key[Array, ""] | None = None

    def real(self) -> Shaped[Array, "B T"] | None:
        """Returns which tokens are not padding; None is all of them."""
        if self.mask.q_segments is None:
            return None
        return self.mask.q_segments != 0

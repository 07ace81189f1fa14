"""Dot-product attention as a value that a layer makes and a cache calls."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.attention import (
    AttentionMask,
    Implementation,
    KeyExchange,
    ScoreTerms,
    attention,
)
from research.kernels.decode_attention import KVPages, decode_attention, takes_pages


@dataclasses.dataclass(frozen=True)
class DotProduct:
    """A layer's attention over keys and values, in rows or in pages.

    Attributes:
      terms: of the scores: scale, soft cap, bias, ALiBi slopes, sinks.
      implementation: which kernel computes it.
      exchange: how queries meet the keys of other devices.
    """

    terms: ScoreTerms
    implementation: Implementation = "auto"
    exchange: KeyExchange = KeyExchange()

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: AttentionMask,
    ) -> Float[Array, "B T N H"]:
        """Returns the attention of the queries over keys and values in rows."""
        terms = self.terms
        return attention(
            q,
            k,
            v,
            mask=mask,
            bias=terms.bias,
            alibi=terms.alibi,
            softcap=terms.softcap,
            sinks=terms.sinks,
            scale=terms.scale,
            implementation=self.implementation,
            exchange=self.exchange,
        )

    def takes_pages(self, q: Float[Array, "B T N H"], pages: KVPages, window: int | None) -> bool:
        """Whether `over_pages` takes a call. Where it does not, pages are gathered into rows."""
        if self.terms.bias is not None:
            return False
        return self.implementation == "reference" or takes_pages(q, pages, window)

    def over_pages(
        self,
        q: Float[Array, "B T N H"],
        pages: KVPages,
        table: Int[Array, "B pages_per_sequence"],
        lengths: Int[Array, "B"],
        window: int | None,
    ) -> Float[Array, "B T N H"]:
        """Returns the attention of each row's T newest tokens over its pages; arguments as of
        `decode_attention`.
        """
        terms = self.terms
        assert terms.bias is None, "decode attention takes no bias"
        # The reference is taken by name only; else each platform has one implementation.
        implementation = "reference" if self.implementation == "reference" else "auto"
        return decode_attention(
            q,
            pages,
            table,
            lengths,
            window=window,
            softcap=terms.softcap,
            sinks=terms.sinks,
            alibi=terms.alibi,
            scale=terms.scale,
            implementation=implementation,
        )


def cache_mask(mask: AttentionMask, positions: Int[Array, "B T"], slots: int) -> AttentionMask:
    """Returns the mask of new tokens over the slots of their cached rows, where slot s holds the
    token of position s.

    Args:
      mask: of the new tokens among themselves; its window and its prefix hold for the cached ones
          too.
      positions: of the new tokens.
      slots: of a row, S.
    """
    # [S] -> [B, S]
    slot_positions = jnp.arange(slots, dtype=positions.dtype)
    slot_positions = jnp.broadcast_to(slot_positions, (positions.shape[0], slots))
    return AttentionMask(
        causal=True,
        window=mask.window,
        prefix=mask.prefix,
        q_positions=positions,
        kv_positions=slot_positions,
    )

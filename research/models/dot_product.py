"""Dot-product attention as a layer asks for it: one value that a layer makes and a cache calls."""

import dataclasses

from jaxtyping import Array, Float

from research.kernels.attention import AttentionMask, Implementation, ScoreTerms, attention


@dataclasses.dataclass(frozen=True)
class DotProduct:
    """How a layer's queries meet keys and values, wherever these lie.

    Attributes:
      terms: of the scores: scale, soft cap, bias, ALiBi slopes, sinks.
      implementation: which kernel computes it.
    """

    terms: ScoreTerms
    implementation: Implementation = "auto"

    def __call__(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: AttentionMask,
    ) -> Float[Array, "B T N H"]:
        """Returns the attention of the queries over keys and values that lie in rows."""
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
        )

"""What goes into the scores besides q kᵀ, as one value that every implementation takes."""

import dataclasses

from jaxtyping import Array, Float

from research.core.errors import UserError
from research.core.trees import node


@node(static=("softcap", "scale"))
@dataclasses.dataclass(frozen=True)
class ScoreTerms:
    """The terms of s = cap(scale · q kᵀ) + bias − alibi · |p_t − p_s|, and of the denominator.

    Attributes:
      bias: added to the scores after the cap; a size of 1 is broadcast. It has a gradient.
      alibi: one slope per head, times the distance of the mask's positions. Constants: their
          gradient is zero.
      sinks: one logit per head that takes part in the denominator only. They have a gradient.
      softcap: static bound of the scores, above 0; None is no bound.
      scale: static factor on q kᵀ.

    Raises:
      UserError: a cap of 0 or below.
    """

    bias: Float[Array, "#B #N #T #S"] | None = None
    alibi: Float[Array, "N"] | None = None
    sinks: Float[Array, "N"] | None = None
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.softcap is not None and self.softcap <= 0:
            raise UserError("softcap", self.softcap, "must be above 0, or None for no bound.")

    @property
    def given(self) -> tuple[str, ...]:
        """The names of the terms that are not None, but for the scale."""
        # A bias and a cap -> ("bias", "softcap")
        terms = {
            "bias": self.bias,
            "alibi": self.alibi,
            "softcap": self.softcap,
            "sinks": self.sinks,
        }
        return tuple(name for name, term in terms.items() if term is not None)

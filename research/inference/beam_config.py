"""The settings of a beam search."""

import dataclasses
from typing import Literal

import numpy as np

from research.core.config import check_types
from research.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class BeamConfig:
    """Settings of a beam search.

    A finished hypothesis of n new tokens, its end-of-text id included, scores Σ log p /
    n^length_penalty.

    Attributes:
      num_beams: hypotheses kept of each prompt.
      max_tokens: new tokens at most.
      min_tokens: new tokens before an end of text, at least.
      length_penalty: above 0 favours long texts, below 0 short ones; max_tokens^length_penalty lies
          in [1e-30, 1e30].
      no_repeat_ngram: n-grams of this many tokens occur at most once, those of the prompt included;
          0 switches the rule off.
      early_stopping: when the search of a prompt ends, once `num_beams` hypotheses are finished:
        `True` at once; `False` when the best running one, scored at its current length, is no
        better than the worst finished; `"never"` when no continuation of it could be better.
      num_return: hypotheses returned of each prompt, best first.
      forced_prefix: ids that every continuation begins with; their log p counts.
      forced_bos: id that comes even before `forced_prefix`, with log p = 0, or None.
      forced_eos: whether a text of `max_tokens` ends with the end-of-text id, with log p = 0.

    Source: Wu et al. 2016, arXiv:1609.08144, equation 14, for the length penalty, which there is
    ((5 + n) / 6)^α beside a coverage penalty; n^α and the three stopping rules are those of
    transformers. No repeated n-grams: Paulus et al. 2018, arXiv:1705.04304, section 2.5.
    """

    num_beams: int = 4
    max_tokens: int = 128
    min_tokens: int = 0
    length_penalty: float = 1.0
    no_repeat_ngram: int = 0
    early_stopping: Literal[False, True, "never"] = False
    num_return: int = 1
    forced_prefix: tuple[int, ...] = ()
    forced_bos: int | None = None
    forced_eos: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        # Within its bounds a length penalty leaves scores finite in float32.
        most_penalty = 30 / np.log10(max(self.max_tokens, 2))
        # Ids that are not free: of three forced ones, max_tokens is at least 3.
        forced = len(self.forced_prefix) + (self.forced_bos is not None) + self.forced_eos
        for name, holds, constraint in (
            ("num_beams", self.num_beams >= 1, "be at least 1"),
            ("max_tokens", self.max_tokens >= 1, "be at least 1"),
            (
                "max_tokens",
                self.max_tokens >= forced,
                f"be at least {forced}, the number of forced ids",
            ),
            (
                "min_tokens",
                0 <= self.min_tokens <= self.max_tokens,
                f"lie in [0, max_tokens = {self.max_tokens}]",
            ),
            ("length_penalty", np.isfinite(self.length_penalty), "be finite"),
            (
                "length_penalty",
                abs(self.length_penalty) <= most_penalty,
                f"lie in [-{most_penalty:.4g}, {most_penalty:.4g}] for max_tokens = "
                f"{self.max_tokens}",
            ),
            ("no_repeat_ngram", self.no_repeat_ngram >= 0, "not be below 0"),
            (
                "num_return",
                1 <= self.num_return <= self.num_beams,
                f"lie in [1, num_beams = {self.num_beams}]",
            ),
        ):
            if not holds:
                raise UserError(name, getattr(self, name), f"must {constraint}.")

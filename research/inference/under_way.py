"""A step that the device runs, and what of it the host will read."""

import dataclasses

import jax
import numpy as np

from research.inference.answers import Sample, TokenLogprobs
from research.inference.sequence import Row
from research.inference.slots import Drawn


@dataclasses.dataclass(frozen=True)
class UnderWay:
    """A step under way.

    Attributes:
      rows: of it.
      drawn: from the rows.
      accepted: how many drafts of each slot were right.
      targets: the token whose log-probability is wanted, by row.
      wanted: how many of the likeliest ids are wanted, and whether those that were kept, by row.
    """

    rows: list[Row]
    drawn: Drawn
    accepted: jax.Array
    targets: dict[int, int]
    wanted: dict[int, tuple[int, bool]]

    def read(self) -> list[TokenLogprobs | None]:
        """Waits for the step; returns what was drawn from each row, or is known of its target. It
        is None of rows that draw nothing, and after a draft that was wrong.
        """
        host = jax.tree.map(np.asarray, (self.drawn.token, self.drawn.logprob, self.accepted))
        tokens, logprobs, right = (array.tolist() for array in host)
        found: list[TokenLogprobs | None] = []
        for index, row in enumerate(self.rows):
            token = tokens[index] if row.draws else self.targets.get(index)
            if token is None or row.draft > right[row.slot]:
                found.append(None)
                continue
            found.append(TokenLogprobs(token, logprobs[index], *self._extras(index)))
        return found

    def top(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns the likeliest ids after a row, and their log-probabilities."""
        return np.asarray(self.drawn.top)[index], np.asarray(self.drawn.top_logprobs)[index]

    def _extras(self, index: int) -> tuple[tuple[tuple[int, float], ...], np.ndarray | None]:
        """Returns the likeliest ids after a row, and those that were kept, where wanted."""
        count, wants_kept = self.wanted.get(index, (0, False))
        top: tuple[tuple[int, float], ...] = ()
        kept = None
        if count:
            ids, logprobs = self.top(index)
            top = tuple(zip(ids[:count].tolist(), logprobs[:count].tolist(), strict=True))
        if wants_kept:
            kept = np.asarray(self.drawn.kept)[index]
        return top, kept


def is_of_prompt(sample: Sample, row: Row) -> bool:
    """Returns whether a row tells the log-probability of a token of the prompt, which is not known
    yet.
    """
    answer = sample.answer
    if answer.request.prompt_logprobs is None or sample is not answer.samples[0]:
        return False
    is_in_prompt = row.position + 1 < len(answer.request.ids)
    return is_in_prompt and row.position + 1 not in answer.prompt_logprobs

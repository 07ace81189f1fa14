"""Answers as `tessera bench exactness` compares them, and counts of what differs."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from research.inference.answers import Answer, TokenLogprobs


def largest(differences: Sequence[float] | Float[np.ndarray, "numbers"]) -> float:
    """Returns the largest difference, 0 of none; infinite where one is no number."""
    found = np.nan_to_num(np.asarray(differences, np.float64), nan=math.inf, posinf=math.inf)
    return float(np.max(found, initial=0.0))


@dataclasses.dataclass
class Count:
    """What has been compared, and that the conditions were met.

    Attributes:
      answers: compared.
      differing: answers that are others, in any part.
      numbers: log-probabilities compared.
      bits: of these that differ.
      preempted: times that a sample lost its pages.
      guessed_right: guesses that counted.
      first: the first difference.
    """

    answers: int = 0
    differing: int = 0
    numbers: int = 0
    bits: int = 0
    preempted: int = 0
    guessed_right: int = 0
    first: str = ""

    def add(self, other: "Count") -> None:
        """Adds what was compared elsewhere."""
        for field in dataclasses.fields(self):
            if field.name != "first":
                total = getattr(self, field.name) + getattr(other, field.name)
                setattr(self, field.name, total)
        self.first = self.first or other.first


@dataclasses.dataclass(frozen=True)
class Found:
    """An answer, as it is compared.

    Attributes:
      told: all but numbers: ids, texts, why they ended, which ids were likeliest and were kept.
      numbers: log-probabilities and scores, float32.
    """

    told: Any
    numbers: Float[np.ndarray, "numbers"]

    @classmethod
    def of(cls, answer: Answer) -> "Found":
        """Returns what an answer is."""
        told: list[Any] = [answer.error]
        numbers: list[float] = []

        def add(each: TokenLogprobs) -> None:
            kept = None if each.kept is None else each.kept.tobytes()
            told.append((each.token, [i for i, _ in each.top], kept))
            numbers.append(each.logprob)
            numbers.extend(logprob for _, logprob in each.top)

        for sample in answer.samples:
            told += [sample.completion(), sample.error]
            for each in sample.logprobs:
                add(each)
        for place in sorted(answer.prompt_logprobs):
            told.append(place)
            add(answer.prompt_logprobs[place])
        told.append([answer.samples.index(sample) for sample in answer.best()])
        for beam in answer.beams or ():
            told.append((beam.tokens, beam.text, beam.finish))
            numbers.append(beam.score)
        return cls(told, np.array(numbers, np.float32))

    def distance(self, other: "Found") -> float:
        """Returns the largest difference of a number; infinite where anything else differs, and
        where one of them is none.
        """
        if self.told != other.told or len(self.numbers) != len(other.numbers):
            return math.inf
        # Both may be -inf.
        differs = self.numbers != other.numbers
        return largest(np.abs(self.numbers[differs] - other.numbers[differs]))

    def compare(self, other: "Found") -> Count:
        """Returns how this differs from what it should be."""
        count = Count(answers=1, numbers=len(other.numbers))
        # Of answers with other tokens as many numbers as both have.
        shared = min(len(self.numbers), len(other.numbers))
        own = self.numbers[:shared].view(np.uint32)
        wanted = other.numbers[:shared].view(np.uint32)
        count.bits = int(np.bitwise_count(own ^ wanted).sum())
        is_same = self.told == other.told and len(self.numbers) == len(other.numbers)
        count.differing = int(not is_same or count.bits > 0)
        return count

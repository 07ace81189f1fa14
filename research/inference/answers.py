"""Answers under way, and what they are when they end."""

import dataclasses
import math
import secrets
import time

import numpy as np
from jaxtyping import UInt32

from research.core.errors import UserError
from research.core.random import SEEDS
from research.inference.grammar import Matcher
from research.inference.grammar_config import GrammarError
from research.inference.guided import allowed_drafts
from research.inference.requests import Request
from research.inference.sequence import Sequence
from research.inference.speculation.gate import Gate
from research.inference.speculation.lookup import Lookup
from research.inference.text import Completion, Detokenizer

NOT_NUMBERS = "its logits are not numbers"
# Seeds that are drawn are below it: every reader of JSON has such a number exactly.
DRAWN_SEEDS = 2**53


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one place of a text.

    Attributes:
      token: the id there.
      logprob: of it.
      top: the likeliest ids with theirs, the likeliest first.
      kept: ids that could be drawn, a bit for each, as of `IdRules.allowed`; None where they were
        not asked for.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    kept: UInt32[np.ndarray, "words"] | None = None


@dataclasses.dataclass(frozen=True)
class Beam(Completion):
    """A completion found by beam search.

    Attributes:
      score: Σ log p of its tokens / number of tokens^length_penalty.
    """

    score: float


class Sample:
    """One of the answers to a request.

    Attributes:
      answer: all of them.
      seed: that it is drawn with.
      sequence: its tokens.
      logprobs: of each of them.
      error: why it ended without an end, or None.
      memory: the row of what an encoder read for it, while it has one.
      gate: whether guesses of its tokens pay.
      lookup: guesses by its text.
      drawn_at: the step that its newest token was drawn in, and the row there.
      matcher: how far its text has come in a grammar; None without one.
    """

    def __init__(self, answer: "Answer", index: int, sequence: Sequence, text: Detokenizer):
        self.answer = answer
        self.seed = (answer.seed + index) % SEEDS
        self.sequence = sequence
        self.logprobs: list[TokenLogprobs] = []
        self.error: str | None = None
        self.memory: int | None = None
        self.gate = Gate()
        self.lookup = Lookup()
        self.drawn_at = (0, 0)
        self.matcher: Matcher | None = None
        self._text = text
        self._new_text = ""

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self._text.finished or self.error is not None

    def push(self, found: TokenLogprobs) -> None:
        """Adds a token, unless it has ended."""
        if self.finished:
            return
        if math.isnan(found.logprob):
            # Of this request alone: the others' rows do not see it.
            self.error = NOT_NUMBERS
            return
        self.error = self._error_of(found.token)
        if self.error is not None:
            return
        self.logprobs.append(found)
        self._new_text += self._text.push(found.token)

    def _error_of(self, token: int) -> str | None:
        """Adds a token to the text of the grammar; returns why it cannot, or None."""
        if self.matcher is None:
            return None
        try:
            accepted = self.matcher.accept(token)
        except GrammarError as error:
            return str(error)
        return None if accepted else self._grammar_error()

    def _grammar_error(self) -> str:
        """Returns why no token that may be drawn is one that the grammar allows."""
        count = len(self.logprobs)
        least = self.answer.request.sampling.min_tokens
        if count < least:
            return f"min_tokens = {least}: after {count} tokens the grammar allows the end alone"
        return "the grammar does not allow what was drawn"

    def guess(self, count: int) -> list[int]:
        """Returns guesses of its next tokens: those that a grammar forces, or what its text says
        elsewhere.
        """
        if self.matcher is None:
            return self.lookup.propose(self.sequence.tokens, count)
        if self.matcher.strained:
            return []
        forced = self.matcher.forced(count)
        if forced:
            return forced
        return allowed_drafts(self.matcher, self.lookup.propose(self.sequence.tokens, count))

    def take_text(self) -> str:
        """Returns the text that has become certain since the last call."""
        if self.finished:
            # An error ends it at any place, as within a character.
            self._new_text += self._text.flush()
        text = self._new_text
        self._new_text = ""
        return text

    def completion(self) -> Completion:
        """Returns the text so far; ends it, where it has not ended."""
        self._new_text += self._text.flush()
        return self._text.completion()

    def mean_logprob(self) -> float:
        """Returns the mean log-probability of its tokens, −∞ without any."""
        if not self.logprobs:
            return -np.inf
        return float(np.mean([each.logprob for each in self.logprobs]))


class Answer:
    """The answers to a request.

    Attributes:
      request: what was asked.
      seed: of its first sample: the request's or, where that has none, one that was drawn. The same
        request with it has the same answer. 0 where nothing is drawn.
      samples: each that is drawn.
      beams: the likeliest answers, best first, where a search was asked for and has ended.
      error: why a search ended without them, or None.
      prompt_logprobs: of each token of the prompt but the first, where they were asked for.
      ends_at: when it must end, by the monotonic clock; None for never.
    """

    def __init__(self, request: Request):
        self.request = request
        self.seed = _seed_of(request)
        self.samples: list[Sample] = []
        self.beams: list[Beam] | None = None
        self.error: str | None = None
        self.prompt_logprobs: dict[int, TokenLogprobs] = {}
        self.ends_at: float | None = None
        if request.deadline is not None:
            self.ends_at = time.monotonic() + request.deadline

    @property
    def finished(self) -> bool:
        """Whether all samples, or the search, have ended."""
        if self.request.beams is not None:
            return self.beams is not None or self.error is not None
        return all(sample.finished for sample in self.samples)

    def best(self) -> list[Sample]:
        """Returns the samples that were asked for: the best where more are drawn.

        Raises:
          UserError: a reward that is no number.
        """
        count = self.request.count
        if len(self.samples) == count:
            return self.samples
        ordered = sorted(self.samples, key=self._goodness, reverse=True)
        return ordered[:count]

    def _goodness(self, sample: Sample) -> float:
        if sample.error is not None:
            return -np.inf
        if self.request.reward is None:
            return sample.mean_logprob()
        reward = float(self.request.reward(sample.completion()))
        if math.isnan(reward):
            raise UserError("reward", reward, "of an answer must be a number.")
        return reward


def _seed_of(request: Request) -> int:
    """Returns the seed of an answer's first sample."""
    sampling = request.sampling
    if sampling.seed is not None:
        return sampling.seed
    if request.beams is not None or sampling.temperature == 0:
        return 0
    # Those of its other samples follow, and are below the limit too.
    return secrets.randbelow(DRAWN_SEEDS - request.num_samples + 1)

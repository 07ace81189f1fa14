"""Beam search: the likeliest continuations of one prompt instead of sampled ones. Plain NumPy: it
knows no model, and says which hypothesis continues which.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Float, Int

from research.core.errors import UserError
from research.inference.beam_config import BeamConfig


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A finished continuation: its new ids, an end-of-text id included, and its score."""

    tokens: tuple[int, ...]
    score: float


@dataclasses.dataclass(frozen=True)
class Running:
    """A hypothesis that goes on.

    Attributes:
      tokens: its new ids.
      score: Σ log p of these, in float32.
      parent: which of the running ones before it continues.
    """

    tokens: tuple[int, ...]
    score: np.float32
    parent: int = 0


class BeamSearch:
    """The search of one prompt.

    Attributes:
      running: the hypotheses that go on, best first; at first one without new ids.
      active: whether the search goes on.

    Args:
      prompt: ids, of an encoder-decoder those that the decoder begins with.
      beams: settings.
      num_ids: only ids below it may be chosen.
      end_ids: those that end a text; the first of them is the forced one.

    Raises:
      UserError: a setting that does not fit the ids.
    """

    def __init__(
        self, prompt: Sequence[int], beams: BeamConfig, num_ids: int, end_ids: Sequence[int]
    ):
        _check_ids(beams, num_ids, end_ids)
        self.running = [Running((), np.float32(0.0))]
        self.active = True
        self._prompt = tuple(prompt)
        self._beams = beams
        self._num_ids = num_ids
        self._end_ids = tuple(end_ids)
        self._finished: list[Hypothesis] = []

    @property
    def num_candidates(self) -> int:
        """Continuations of each running hypothesis that `advance` takes.

        With `ends` end-of-text ids, (ends + 1) · num_beams leave enough that run on even where
        every beam ends in all ways.
        """
        most = (len(self._end_ids) + 1) * self._beams.num_beams
        return min(most, self._num_ids)

    @property
    def has_rules(self) -> bool:
        """Whether some ids may not come next, now or later."""
        beams = self._beams
        has_forced = beams.forced_eos or beams.forced_prefix or beams.forced_bos is not None
        return bool(beams.no_repeat_ngram or beams.min_tokens or has_forced)

    def allowed(self) -> Bool[np.ndarray, "running ids"]:
        """Returns which ids may continue each running hypothesis."""
        may = np.ones((len(self.running), self._num_ids), bool)
        forced, _ = self._forced()
        if forced is not None:
            # It comes even where another rule forbids it.
            may[:] = False
            may[:, forced] = True
            return may
        for row, hypothesis in enumerate(self.running):
            may[row, self._forbidden(hypothesis)] = False
        return may

    def _forbidden(self, hypothesis: Running) -> list[int]:
        """Returns the ids that n-grams and `min_tokens` keep from a hypothesis."""
        tokens = self._prompt + hypothesis.tokens
        # Prompts may have ids that are never chosen.
        found = completions(tokens, self._beams.no_repeat_ngram)
        found = [i for i in found if i < self._num_ids]
        if len(hypothesis.tokens) < self._beams.min_tokens:
            found += self._end_ids
        return found

    def _forced(self) -> tuple[int | None, bool]:
        """Returns the id that must come next, None where it is free, and whether its log p is 0."""
        beams = self._beams
        made = len(self.running[0].tokens)
        bos = () if beams.forced_bos is None else (beams.forced_bos,)
        begin = (*bos, *beams.forced_prefix)
        if made < len(begin):
            return begin[made], made < len(bos)
        if beams.forced_eos and made == beams.max_tokens - 1:
            return self._end_ids[0], True
        return None, False

    def advance(
        self,
        ids: Int[np.ndarray, "running candidates"],
        log_p: Float[np.ndarray, "running candidates"],
    ) -> None:
        """Extends the hypotheses by one token; of equal ones that of the better beam, then that of
        the lower id, is first.

        Args:
          ids: likeliest allowed ones after each running hypothesis, `num_candidates` of them where
            there are as many.
          log_p: of these, by the model alone; −∞ for ids that are not allowed.
        """
        candidates = []
        forced, is_unscored = self._forced()
        for parent, hypothesis in enumerate(self.running):
            for token, value in zip(ids[parent].tolist(), log_p[parent], strict=True):
                # A forced id that a rule forbids has log p = 0, as if it were unscored.
                if token == forced and (is_unscored or token in self._forbidden(hypothesis)):
                    value = np.float32(0.0)
                score = hypothesis.score + np.float32(value)
                if score > -np.inf:
                    candidates.append(Running((*hypothesis.tokens, token), score, parent))
        candidates.sort(key=lambda each: (-each.score, each.parent, each.tokens[-1]))

        # Of those that end only the best `num_beams` count.
        num_beams = self._beams.num_beams
        running = []
        for rank, each in enumerate(candidates[: (len(self._end_ids) + 1) * num_beams]):
            is_last = len(each.tokens) >= self._beams.max_tokens
            if not is_last and each.tokens[-1] not in self._end_ids:
                running.append(each)
            elif rank < num_beams:
                score = each.score / self._penalty(len(each.tokens))
                self._finished.append(Hypothesis(each.tokens, float(score)))
        self._finished.sort(key=lambda each: -each.score)
        del self._finished[num_beams:]
        self.running = running[:num_beams]
        self.active = self._may_improve()

    def _penalty(self, length: int) -> np.float32:
        return np.float32(length) ** np.float32(self._beams.length_penalty)

    def _may_improve(self) -> bool:
        """Returns whether the best running hypothesis may yet displace a finished one."""
        if not self.running:
            return False
        beams = self._beams
        if len(self._finished) < beams.num_beams:
            return True
        if beams.early_stopping is True:
            return False
        # With a penalty above 0, a running hypothesis scores best at the greatest length.
        length = len(self.running[0].tokens)
        if beams.early_stopping == "never" and beams.length_penalty > 0:
            length = beams.max_tokens
        best = self.running[0].score / self._penalty(length)
        return bool(best > self._finished[-1].score)

    def hypotheses(self) -> list[Hypothesis]:
        """Returns the best finished ones, best first; fewer than `num_return` only where the rules
        leave no more.

        Raises:
          UserError: there are none.
        """
        if not self._finished:
            beams = self._beams
            raise UserError(
                "no_repeat_ngram",
                beams.no_repeat_ngram,
                f"with min_tokens = {beams.min_tokens} leaves no continuation of max_tokens = "
                f"{beams.max_tokens}.",
            )
        return self._finished[: self._beams.num_return]


def _check_ids(beams: BeamConfig, num_ids: int, end_ids: Sequence[int]) -> None:
    """Raises UserError where the settings do not fit the ids."""
    bos = () if beams.forced_bos is None else (beams.forced_bos,)
    forced = {"forced_prefix": beams.forced_prefix, "forced_bos": bos}
    for name, ids in forced.items():
        for i in ids:
            if not 0 <= i < num_ids:
                raise UserError(f"{name}: id {i} is out of range: it must lie in [0, {num_ids}).")
            if i in end_ids:
                raise UserError(f"{name}: id {i} is the end of text, which nothing can follow.")
    if beams.forced_eos and not end_ids:
        raise UserError("forced_eos", True, "needs a tokenizer that has an end-of-text id.")


def completions(tokens: Sequence[int], size: int) -> list[int]:
    """Returns the ids that would complete an n-gram of `size` tokens that a text already has, none
    for a size of 0.

    With size = 3, [5, 6, 7, 5, 6] must not continue with 7.
    """
    if not size or len(tokens) < size:
        return []
    newest = tuple(tokens[len(tokens) - size + 1 :])
    found = []
    for start in range(len(tokens) - size + 1):
        *begin, last = tokens[start : start + size]
        if tuple(begin) == newest:
            found.append(last)
    return found

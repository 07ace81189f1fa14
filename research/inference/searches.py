"""The beam searches of a replica."""

from collections.abc import Sequence as Rows

import numpy as np
from jaxtyping import Float, Int, UInt32

from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.inference.answers import Answer, Beam
from research.inference.beam_lanes import BeamLanes, Changes, Lane
from research.inference.beam_search import BeamSearch, Hypothesis
from research.inference.id_masks import pack_words
from research.inference.scheduler import Scheduler
from research.inference.sequence import Sequence
from research.inference.text import Detokenizer


class Searches:
    """Searches under way, by answer.

    Args:
      tokenizer: of the model.
      num_ids: only ids below it are chosen.
      has_encoder: whether prompts are read by an encoder.
    """

    def __init__(self, tokenizer: Tokenizer, num_ids: int, *, has_encoder: bool):
        self._tokenizer = tokenizer
        self._num_ids = num_ids
        self._has_encoder = has_encoder
        self._lanes: dict[Answer, BeamLanes] = {}

    def begin(self, answer: Answer, sequence: Sequence) -> Lane:
        """Returns the first lane of a search, which reads the prompt.

        Raises:
          UserError: settings that do not fit the ids.
        """
        beams = answer.request.beams
        assert beams is not None
        sequence.needs_host = True
        end_ids = [i for i in self._tokenizer.end_ids if i < self._num_ids]
        search = BeamSearch(sequence.tokens, beams, self._num_ids, end_ids)
        lane = Lane(answer, sequence)
        self._lanes[answer] = BeamLanes(search, lane)
        return lane

    def mask(self, lane: Lane) -> UInt32[np.ndarray, "1 words"] | None:
        """Returns which ids may continue a lane; None for all."""
        allowed = self._lanes[lane.answer].allowed(lane)
        return None if allowed is None else pack_words(allowed)[None]

    def collect(
        self, lane: Lane, ids: Int[np.ndarray, "top"], log_p: Float[np.ndarray, "top"]
    ) -> bool:
        """As `BeamLanes.collect`."""
        return self._lanes[lane.answer].collect(lane, ids, log_p)

    def advance(self, answer: Answer, scheduler: Scheduler) -> Changes:
        """Extends the hypotheses of a search by one token; where none goes on, the answer has its
        beams.
        """
        lanes = self._lanes[answer]
        changes = lanes.advance(scheduler)
        if not lanes.search.active:
            del self._lanes[answer]
            try:
                found = lanes.search.hypotheses()
                answer.beams = [self._beam(answer, each) for each in found]
            except UserError as error:
                answer.error = str(error)
        return changes

    def end(self, answer: Answer) -> Rows[Lane]:
        """Ends a search, and returns its lanes."""
        lanes = self._lanes.pop(answer, None)
        return [] if lanes is None else lanes.lanes

    def _beam(self, answer: Answer, found: Hypothesis) -> Beam:
        request = answer.request
        prompt = [] if self._has_encoder else request.ids
        text = Detokenizer(self._tokenizer, prompt, stop=(), max_tokens=request.max_tokens)
        for token in found.tokens:
            text.push(token)
        return Beam(**vars(text.completion()), score=found.score)

"""A beam search among the sequences of an engine: each running hypothesis is a lane, which has a
slot and pages as any sequence has.
"""

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float, Int

from research.inference.beam_search import BeamSearch
from research.inference.scheduler import PageCopy, Scheduler
from research.inference.sequence import Sequence

if TYPE_CHECKING:
    from research.inference.answers import Answer


@dataclasses.dataclass(eq=False)
class Lane:
    """A hypothesis that goes on.

    Attributes:
      answer: what it is part of.
      sequence: prompt and new ids.
      memory: the row of what an encoder read for it, while it has one.
    """

    answer: "Answer"
    sequence: Sequence
    memory: int | None = None


@dataclasses.dataclass(frozen=True)
class Changes:
    """What an extension of all hypotheses by one token changed.

    Attributes:
      begun: lanes that are new.
      ended: lanes that are over.
      copies: pages to copy, and where to.
    """

    begun: list[Lane]
    ended: list[Lane]
    copies: list[PageCopy]


class BeamLanes:
    """The lanes of one search.

    Attributes:
      search: which knows what continues what.
      lanes: one for each of its running hypotheses, in their order.
    """

    def __init__(self, search: BeamSearch, first: Lane):
        self.search = search
        self.lanes = [first]
        self._found: dict[Lane, tuple[np.ndarray, np.ndarray]] = {}
        self._allowed = search.allowed() if search.has_rules else None
        self._num_lanes = 1

    def collect(
        self, lane: Lane, ids: Int[np.ndarray, "top"], log_p: Float[np.ndarray, "top"]
    ) -> bool:
        """Takes the likeliest continuations of a lane; returns whether all lanes have theirs."""
        count = self.search.num_candidates
        self._found[lane] = (ids[:count], log_p[:count])
        lane.sequence.pause()
        return all(lane in self._found for lane in self.lanes)

    def allowed(self, lane: Lane) -> Bool[np.ndarray, "ids"] | None:
        """Returns which ids may continue a lane; None for all."""
        return None if self._allowed is None else self._allowed[self.lanes.index(lane)]

    def advance(self, scheduler: Scheduler) -> Changes:
        """Extends all hypotheses by one token.

        A hypothesis goes on in the lane of its parent, with the parent's pages. Of two children of
        one parent the second gets a lane of its own, which shares the full pages and copies the one
        that is filled in part.
        """
        found = [self._found.pop(lane) for lane in self.lanes]
        ids, log_p = (np.stack(arrays) for arrays in zip(*found, strict=True))
        self.search.advance(ids, log_p)
        old = self.lanes
        if not self.search.active:
            return Changes([], old, [])

        parents = [each.parent for each in self.search.running]
        ended = [lane for index, lane in enumerate(old) if index not in parents]
        for lane in ended:
            scheduler.end(lane.sequence)
        lanes = []
        begun = []
        copies = []
        for index, hypothesis in enumerate(self.search.running):
            parent = old[hypothesis.parent]
            if hypothesis.parent in parents[:index]:
                lane = self._fork(parent, hypothesis.tokens[-1])
                copies += scheduler.fork(parent.sequence, lane.sequence)
                begun.append(lane)
            else:
                lane = parent
            lanes.append(lane)
        # The parents' own tokens, after all children have taken what came before.
        for lane, hypothesis in zip(lanes, self.search.running, strict=True):
            if lane not in begun:
                lane.sequence.add([hypothesis.tokens[-1]])
        self.lanes = lanes
        if self._allowed is not None:
            self._allowed = self.search.allowed()
        return Changes(begun, ended, copies)

    def _fork(self, parent: Lane, token: int) -> Lane:
        sequence = parent.sequence
        self._num_lanes += 1
        child = Sequence(
            order=(*sequence.order[:-1], self._num_lanes),
            tokens=[*sequence.tokens, token],
            limit=sequence.limit,
            chain_start=sequence.chain_start,
            in_one_piece=sequence.in_one_piece,
            needs_host=True,
            is_urgent=True,
        )
        return Lane(parent.answer, child, parent.memory)

"""What a replica is answering: samples and lanes under way, by their sequences."""

import heapq
from collections.abc import ItemsView, Iterable, Iterator

from research.inference.answers import Answer, Sample
from research.inference.beam_lanes import Lane
from research.inference.sequence import Sequence

# Deadlines of ended answers that are kept.
FEW_DEADLINES = 64


class Members:
    """Samples and lanes under way. None of its operations takes longer where more of them wait.

    Attributes:
      load: tokens that they may have, prompts included.
    """

    def __init__(self) -> None:
        self.load = 0
        self._members: dict[Sequence, Sample | Lane] = {}
        self._ended: list[Answer] = []
        # When answers end by their deadlines, the first of them first, and these answers.
        self._deadlines: list[tuple[float, int]] = []
        self._timed: dict[int, Answer] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __getitem__(self, sequence: Sequence) -> Sample | Lane:
        return self._members[sequence]

    def get(self, sequence: Sequence) -> Sample | Lane | None:
        """Returns whose sequence it is; None where that has ended."""
        return self._members.get(sequence)

    def items(self) -> ItemsView[Sequence, Sample | Lane]:
        """Returns all, with their sequences."""
        return self._members.items()

    def add(self, member: Sample | Lane) -> None:
        """Takes a sample or a lane."""
        self._members[member.sequence] = member
        self.load += member.sequence.limit

    def time(self, answer: Answer, arrival: int) -> None:
        """Ends an answer at its deadline, if it has one: see `late`.

        Args:
          answer: which.
          arrival: its number among all.
        """
        if answer.ends_at is not None:
            heapq.heappush(self._deadlines, (answer.ends_at, arrival))
            self._timed[arrival] = answer

    def remove(self, member: Sample | Lane) -> None:
        """Ends a sample or a lane, if it is under way."""
        sequence = member.sequence
        if self._members.pop(sequence, None) is None:
            return
        self.load -= sequence.limit
        if member.answer.finished:
            self._ended.append(member.answer)
            _, arrival, _ = sequence.order
            self._timed.pop(arrival, None)
            if len(self._deadlines) > 2 * len(self._timed) + FEW_DEADLINES:
                self._forget_deadlines()

    def _forget_deadlines(self) -> None:
        """Leaves the deadlines of answers under way alone."""
        kept = [each for each in self._deadlines if each[1] in self._timed]
        heapq.heapify(kept)
        self._deadlines = kept

    def memory_row(self, member: Sample | Lane, running: Iterable[Sequence]) -> tuple[int, bool]:
        """Returns the row of the memory for what the encoder reads for a request, which all its
        sequences share, and whether it is there already.

        Args:
          member: whose request.
          running: sequences that have a slot, this one's among them.
        """
        others = [self._members[sequence] for sequence in running]
        rows = {}
        for other in others:
            if other.memory is not None and other is not member:
                rows[other.answer] = other.memory
        is_read = member.answer in rows
        if is_read:
            member.memory = rows[member.answer]
        else:
            # There are as many rows as slots.
            taken = set(rows.values())
            member.memory = next(row for row in range(len(others)) if row not in taken)
        return member.memory, is_read

    def late(self, now: float) -> Iterator[Answer]:
        """Yields the answers whose deadline has passed."""
        while self._deadlines and self._deadlines[0][0] < now:
            _, arrival = heapq.heappop(self._deadlines)
            answer = self._timed.pop(arrival, None)
            if answer is not None:
                yield answer

    def take_ended(self) -> list[Answer]:
        """Returns the answers that have ended since the last call."""
        ended = self._ended
        self._ended = []
        return ended

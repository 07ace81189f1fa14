"""Which tokens the next step of the engine takes: continuous batching over slots and pages. Plain
Python, which never asks what a token is.

A prompt and an answer are the same here: a sequence whose tokens must be written to the cache, one
after the other. The row of its newest token draws the next one. So prompts may be cut anywhere,
and a sequence that lost its pages is written again like a prompt.
"""

import bisect
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Listed

from research.inference import page_kinds
from research.inference.page_kinds import PageKind
from research.inference.pages import PagePool
from research.inference.sequence import Row, Sequence

# A page to copy and where to, of each kind.
PageCopy = tuple[tuple[int, int], ...]


class Scheduler:
    """Sequences that wait, and sequences that have a slot.

    Args:
      slots: sequences that run at a time, at most.
      kinds: of layers, which say what pages there are; one that attends to all tokens comes first.
      rows: tokens that a step takes, at least `slots`.
    """

    def __init__(self, slots: int, kinds: Listed[PageKind], rows: int):
        assert rows >= slots
        assert all(kind.window for kind in kinds[1:])
        self.kinds = tuple(kinds)
        self.page_size = kinds[0].page_size
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        # Those that got their slots and were not asked for yet.
        self.admitted: list[Sequence] = []
        self._rows = rows
        # The first slot is taken first.
        self._free_slots = list(range(slots - 1, -1, -1))

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence, which the pools must be able to hold alone."""
        for kind in self.kinds:
            assert kind.at_once(sequence.limit, self._rows) < kind.pool.num_pages
        self._wait(sequence)

    def _wait(self, sequence: Sequence) -> None:
        """Puts a sequence among those that wait, which are in order."""
        bisect.insort(self.waiting, sequence, key=lambda each: each.order)

    def pages_of(self, tokens: int) -> int:
        """Returns how many pages so many tokens take."""
        return page_kinds.pages_of(tokens, self.page_size)

    def _by_kind(self, pages: Listed[list[int]]) -> Iterator[tuple[PageKind, list[int]]]:
        """Returns the kinds of layers with a sequence's pages in each."""
        return zip(self.kinds, pages, strict=True)

    def fork(self, parent: Sequence, child: Sequence) -> list[PageCopy]:
        """Gives a sequence that begins as another one a slot, the other's full pages, and a copy of
        the page that is filled in part; or queues it.

        Args:
          parent: all of whose tokens are written, if it runs.
          child: with these tokens and one more.

        Returns:
          the page to copy, and where to; none where there is nothing to copy.
        """
        full, rest = divmod(parent.written, self.page_size)
        has_pages = not rest or all(kind.pool.available for kind in self.kinds)
        if parent.slot is None or not self._free_slots or not has_pages:
            self.add(child)
            return []
        child.pages = tuple(pages[:full] for pages in parent.pages)
        for kind, pages in self._by_kind(child.pages):
            kind.share(pages)
            if rest:
                pages += kind.take(1)
        copies = []
        if rest:
            sources = [pages[full] for pages in parent.pages]
            targets = [pages[full] for pages in child.pages]
            copies.append(tuple(zip(sources, targets, strict=True)))
        child.written = parent.written
        child.reads_piece = False
        self._run(child)
        return copies

    def _run(self, sequence: Sequence) -> None:
        """Gives a sequence a slot."""
        sequence.slot = self._free_slots.pop()
        self.running.append(sequence)
        self.admitted.append(sequence)

    def take_admitted(self) -> list[Sequence]:
        """Returns the running sequences that got their slots since the last call."""
        admitted = [each for each in self.admitted if each.slot is not None]
        self.admitted = []
        return admitted

    def end(self, sequence: Sequence) -> None:
        """Frees what a sequence has, in whatever state it is."""
        sequence.ended = True
        if sequence.slot is not None:
            self._stop(sequence)
            return
        # No two sequences are equal in order.
        index = bisect.bisect_left(self.waiting, sequence.order, key=lambda each: each.order)
        if self.waiting[index : index + 1] == [sequence]:
            del self.waiting[index]

    def plan(self) -> list[Row]:
        """Returns the rows of the next step: newest tokens of answers, and parts of prompts."""
        for sequence in self.running:
            for kind, pages in self._by_kind(sequence.pages):
                kind.release_passed(pages, sequence.written)
        self._admit()
        rows: list[Row] = []
        # In order: who loses its pages to another has no rows yet.
        for sequence, count in self._counts().items():
            rows += self._take(sequence, count)
        self._name_pages(self.running)
        return rows

    def _counts(self) -> dict[Sequence, int]:
        """Returns how many rows each running sequence gets, in order."""
        ordered = self._in_order()
        counts = {}
        for each in ordered:
            count = min(each.missing, 1)
            counts[each] = count + len(each.drafts) * count
        left = self._rows - sum(counts.values())
        # Shares of what is left, the shortest first: what it does not need is the others'.
        long = sorted((each for each in ordered if each.missing > 1), key=lambda each: each.missing)
        for index, sequence in enumerate(long):
            share = left // (len(long) - index)
            more = min(share, sequence.missing - 1)
            counts[sequence] += more
            left -= more
        return counts

    def _in_order(self) -> list[Sequence]:
        return sorted(self.running, key=lambda each: each.order)

    def _admit(self) -> None:
        """Gives slots to waiting sequences while there are pages for their tokens, in order: none
        overtakes another.
        """
        for sequence in list(self.waiting):
            if sequence.paused or self._follows(sequence):
                continue
            if not sequence.is_known or not self._has_slot(sequence):
                return
            shared = self._find_prefix(sequence)
            while not self._has_room(sequence, shared):
                if not self._stop_paused(sequence):
                    return
            for kind, pages in self._by_kind(shared):
                kind.share(pages)
            sequence.pages = tuple(shared)
            sequence.written = len(shared[0]) * self.page_size
            sequence.reads_piece = sequence.in_one_piece > 0
            if sequence.reads_piece:
                assert not sequence.written
                count = self.pages_of(sequence.in_one_piece)
                for kind, pages in self._by_kind(sequence.pages):
                    pages += kind.take(count)
                # The next token is drawn from the row of the last one.
                sequence.written = sequence.in_one_piece - 1
            self.waiting.remove(sequence)
            self._run(sequence)

    def _has_room(self, sequence: Sequence, shared: list[list[int]]) -> bool:
        """Returns whether there are pages of each kind for a sequence, some of which it shares."""
        for kind, pages in self._by_kind(shared):
            had = page_kinds.had(pages)
            idle = sum(1 for page in had if not kind.pool.owners(page))
            # Room for one more token, so that it is not preempted for its first one.
            tokens = sequence.length + 1
            needed = kind.at_once(tokens, self._rows) - len(had)
            if needed > kind.pool.available - idle:
                return False
        return True

    def _stop_paused(self, sequence: Sequence) -> bool:
        """Takes slot and pages from one that waits for others to be read, this sequence perhaps
        among them; returns whether there is one of the same request or a later one.
        """
        for other in reversed(self._in_order()):
            is_same_request = other.order[:-1] == sequence.order[:-1]
            if other.paused and (is_same_request or other.order > sequence.order):
                self._stop(other)
                self._wait(other)
                return True
        return False

    def _has_slot(self, sequence: Sequence) -> bool:
        """Returns whether there is a slot, which an urgent sequence takes from the last one."""
        if self._free_slots:
            return True
        last = self._in_order()[-1]
        if not sequence.is_urgent or last.order < sequence.order:
            return False
        self._stop(last)
        self._wait(last)
        return True

    def _follows(self, sequence: Sequence) -> bool:
        """Returns whether a sequence waits for another to write the pages that both begin with."""
        leader = sequence.leader
        if leader is None or leader.ended or sequence.chain_start is None:
            return False
        shared = (sequence.length - 1) // self.page_size * self.page_size
        return leader.written < shared

    def _find_prefix(self, sequence: Sequence) -> list[list[int]]:
        """Returns the pages of its first tokens that are there already, by kind. Its last token is
        always written again: the next one is drawn from it.
        """
        if sequence.chain_start is None or sequence.reads_all:
            return [[] for _ in self.kinds]
        full = (sequence.length - 1) // self.page_size
        digests = sequence.digests(self.page_size)
        return page_kinds.find_prefix(self.kinds, digests[:full])

    def _take(self, sequence: Sequence, count: int) -> list[Row]:
        """Returns the rows of a sequence's next tokens, with pages for them; none where it has lost
        its slot.
        """
        if sequence.slot is None or not count:
            return []
        end = sequence.written + count
        for kind, pages in self._by_kind(sequence.pages):
            while len(pages) < self.pages_of(end):
                if not self._make_room(sequence, kind.pool):
                    return []
                pages += kind.take(1)

        rows = []
        for position in range(sequence.written, end):
            # The newest token has index 0, the drafts after it 1, 2, …
            draft = max(position - sequence.length + 1, 0)
            draws = position >= sequence.length - 1
            token = sequence.token_at(position)
            rows.append(Row(sequence, sequence.slot, position, token, draws, draft))
        sequence.written = end
        if rows[-1].draws:
            sequence.length += 1
        return rows

    def _make_room(self, sequence: Sequence, pool: PagePool) -> bool:
        """Makes sure of an available page of a pool, by the pages of the last sequences in order;
        returns whether the sequence itself kept its own.
        """
        while not pool.available:
            last = self._in_order()[-1]
            self._stop(last)
            self._wait(last)
            if last is sequence:
                return False
        return True

    def restart(self) -> None:
        """Takes the pages of all running sequences, and ends the validity of those that are kept:
        they are written anew. Nothing of a step that the host has not read counts.
        """
        for sequence in list(self.running):
            self._stop(sequence)
            self._wait(sequence)
        for sequence in self.waiting:
            sequence.length = len(sequence.tokens)
        for kind in self.kinds:
            kind.pool.forget()

    def _stop(self, sequence: Sequence) -> None:
        """Takes slot and pages from a running sequence."""
        self.running.remove(sequence)
        assert sequence.slot is not None
        self._free_slots.append(sequence.slot)
        for kind, pages in self._by_kind(sequence.pages):
            kind.release(pages)
        sequence.slot = None
        sequence.pages = ()
        sequence.written = 0
        sequence.named = 0
        sequence.drafts = ()

    def _name_pages(self, sequences: Iterable[Sequence]) -> None:
        """Tells the pools what full pages hold, for sequences that are admitted later: their rows
        come after those that write these pages.
        """
        for sequence in sequences:
            if sequence.chain_start is None:
                continue
            named = sequence.named
            known = min(sequence.written, len(sequence.tokens)) // self.page_size
            if known <= named:
                continue
            digests = sequence.digests(self.page_size)[named:known]
            for kind, pages in self._by_kind(sequence.pages):
                kind.name(pages[named:known], digests)
            sequence.named = known

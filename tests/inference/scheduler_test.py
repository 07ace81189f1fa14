"""Every token is written after its predecessors, in pages that keep theirs; no page or slot is
lost, whatever arrives, ends, forks or is preempted, in any kinds of layers.
"""

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.inference.page_kinds import PageKind, had, pages_at_once
from research.inference.pages import PagePool, chain_start
from research.inference.scheduler import PageCopy, Scheduler
from research.inference.sequence import Row, Sequence

PAGE = 4
ROWS = 12
START = chain_start({})
Step = tuple[list[Row], list[int | None]]


def drawn(tokens: list[int]) -> int:
    """The token that a sequence goes on with: a function of all of its tokens."""
    return hash(tuple(tokens)) % 7


class Device:
    """What is in the pages of each kind, and the newest token of each slot."""

    def __init__(self, windows: list[int]):
        # Of each slot of a page the tokens that gave its keys, and the parameters.
        self.pages: dict[tuple[int, int, int], tuple[int, list[int]]] = {}
        self.newest: dict[int, int] = {}
        self.params = 0
        self._windows = windows

    def run(self, rows: list[Row], tables: list[list[list[int]]]) -> list[int | None]:
        found: list[int | None] = []
        right: dict[int, bool] = {}
        for row, pages in zip(rows, tables, strict=True):
            histories = [self._read(row, kind, own) for kind, own in enumerate(pages)]
            history = max(histories, key=len)
            for kind, own in enumerate(pages):
                assert history[-len(histories[kind]) :] == histories[kind]
                place = (kind, own[row.position // PAGE], row.position % PAGE)
                self.pages[place] = (self.params, history)
            if not row.draws:
                found.append(None)
                continue
            # A draft counts where the draw before it is the same token.
            is_right = not row.draft or (right[row.slot] and self.newest[row.slot] == history[-1])
            right[row.slot] = is_right
            found.append(drawn(history) if is_right else None)
            if is_right:
                self.newest[row.slot] = drawn(history)
        return found

    def _read(self, row: Row, kind: int, pages: list[int]) -> list[int]:
        """The tokens up to a row, of the slots that it attends to in a kind of layers."""
        token = self.newest[row.slot] if row.token is None else row.token
        window = self._windows[kind]
        first = max(row.position - window + 1, 0) if window else 0
        # Each slot holds the token, and all those before it, that gave its keys.
        kept = []
        for position in range(first, row.position):
            params, tokens = self.pages[kind, pages[position // PAGE], position % PAGE]
            assert params == self.params, "the keys are of other parameters"
            kept.append(tokens)
        history = [*kept[-1], token] if kept else [token]
        for position, each in enumerate(kept, first):
            assert each == history[: position + 1], "the keys are of other tokens"
        return history

    def copy(self, copies: list[PageCopy]) -> None:
        for copy in copies:
            for kind, (source, target) in enumerate(copy):
                for slot in range(PAGE):
                    if (kind, source, slot) in self.pages:
                        self.pages[kind, target, slot] = self.pages[kind, source, slot]


@dataclasses.dataclass
class Serving:
    """Sequences under way, beside a device.

    With `draws` some of them get guesses, fork, and lose their pages to other parameters; a few are
    aborted whenever a step is a multiple of 5.
    """

    scheduler: Scheduler
    device: Device
    aborted: set[int]
    draws: random.Random | None
    under_way: list[Step] = dataclasses.field(default_factory=list)
    forked: list[tuple[Sequence, list[int]]] = dataclasses.field(default_factory=list)

    def read(self) -> None:
        """What the host makes of a step."""
        found: dict[Sequence, list[int]] = {}
        for row, token in zip(*self.under_way.pop(0), strict=True):
            if token is not None and self._is_alive(row.sequence):
                found.setdefault(row.sequence, []).append(token)
        for sequence, tokens in found.items():
            is_known = sequence.needs_host and not self.under_way and not sequence.drafts
            if is_known and self.draws.random() < 0.2:
                self._fork(sequence, (tokens[0] + 1) % 7)
            sequence.add(tokens)
            if len(sequence.tokens) >= sequence.limit:
                self.scheduler.end(sequence)

    def _is_alive(self, sequence: Sequence) -> bool:
        return sequence in self.scheduler.running or sequence in self.scheduler.waiting

    def _fork(self, parent: Sequence, token: int) -> None:
        """Begins another sequence after the same tokens."""
        if parent.slot is not None and parent.written != len(parent.tokens):
            return
        order = (parent.order[0], 100 + len(self.forked))
        tokens = [*parent.tokens, token]
        if len(tokens) >= parent.limit:
            return
        child = Sequence(order, tokens, parent.limit, parent.chain_start, needs_host=True)
        self.device.copy(self.scheduler.fork(parent, child))
        self.forked.append((child, list(tokens)))

    def prepare(self) -> None:
        """Has guesses made, where there are `draws`."""
        running = self.scheduler.running
        has_drafts = any(sequence.drafts for sequence in running)
        waits = self.draws is not None and (has_drafts or self.draws.random() < 0.7)
        for sequence in running:
            sequence.needs_host = waits
        if not waits:
            return
        while self.under_way:
            self.read()
        if self.draws.random() < 0.05:
            self.device.params += 1
            self.scheduler.restart()
        for sequence in running:
            room = min(sequence.limit - 1 - sequence.length, 2)
            if not sequence.is_answering or room < 1:
                continue
            text = list(sequence.tokens)
            for _ in range(room):
                text.append(drawn(text) if self.draws.random() < 0.6 else 9)
            sequence.drafts = tuple(text[len(sequence.tokens) :])

    def step(self) -> None:
        self.prepare()
        rows = self.scheduler.plan()
        assert len(rows) <= ROWS
        self.check_pages()
        tables = [[list(pages) for pages in row.sequence.pages] for row in rows]
        if rows:
            self.under_way.append((rows, self.device.run(rows, tables)))
        # The host reads a step when the next one has been planned.
        if len(self.under_way) > 1 or (self.under_way and not rows):
            self.read()

    def check_pages(self) -> None:
        """Every page has the owners that have it, and no more pages are had than a window needs."""
        for index, kind in enumerate(self.scheduler.kinds):
            owned = []
            for sequence in self.scheduler.running:
                pages = had(sequence.pages[index])
                assert len(pages) <= kind.at_once(sequence.limit, ROWS)
                owned += pages
            for page in range(1, kind.pool.num_pages):
                assert kind.pool.owners(page) == owned.count(page)
            assert kind.pool.available == kind.pool.num_pages - 1 - len(set(owned))


def serve(serving: Serving, arrivals: list[list[Sequence]]) -> None:
    """Runs all sequences to their end, those that are aborted for a few steps."""
    scheduler = serving.scheduler
    steps = 0
    while arrivals or scheduler.waiting or scheduler.running or serving.under_way:
        for sequence in arrivals.pop(0) if arrivals else []:
            scheduler.add(sequence)
        serving.step()
        steps += 1
        assert steps < 4000
        for sequence in [*scheduler.running, *scheduler.waiting]:
            if sequence.order[1] in serving.aborted and steps % 5 == 0:
                scheduler.end(sequence)
    serving.check_pages()


def alone(tokens: list[int], limit: int) -> list[int]:
    """What a sequence becomes."""
    found = list(tokens)
    while len(found) < limit:
        found.append(drawn(found))
    return found


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_pages=st.integers(12, 40),
    shares=st.booleans(),
    windows=st.sampled_from([(0,), (6,), (0, 6), (0, 1), (0, 6), (0, 13)]),
    roomy=st.booleans(),
    guesses=st.booleans(),
)
def test_any_requests_are_answered_as_alone(
    seed: int, num_pages: int, shares: bool, windows: tuple, roomy: bool, guesses: bool
):
    draws = random.Random(seed)
    arrivals = []
    sequences = []
    for index in range(draws.randint(1, 12)):
        length = draws.randint(1, 30)
        # Few different prompts, so that many begin alike.
        prompt = [(i * draws.choice([1, 1, 2])) % 5 for i in range(length)]
        limit = length + draws.randint(1, 12)
        start = START if shares else None
        sequence = Sequence((draws.choice([0, 0, 1]), index), prompt, limit, start)
        if not arrivals or draws.random() < 0.5:
            arrivals.append([])
        arrivals[-1].append(sequence)
        sequences.append((sequence, list(prompt)))
    aborted = {index for index in range(len(sequences)) if draws.random() < 0.2}

    kinds = [PageKind(PagePool(num_pages), PAGE, windows[0])]
    for window in windows[1:]:
        # Else as few pages as one sequence needs.
        least = 1 + pages_at_once(window, ROWS, PAGE)
        kinds.append(PageKind(PagePool(num_pages if roomy else least), PAGE, window))
    scheduler = Scheduler(4, kinds, ROWS)
    serving = Serving(scheduler, Device(windows), aborted, draws if guesses else None)
    serve(serving, arrivals)
    for kind in kinds:
        assert kind.pool.available == kind.pool.num_pages - 1
    for sequence, tokens in [*sequences, *serving.forked]:
        if sequence.order[1] not in aborted:
            assert sequence.tokens[: sequence.limit] == alone(tokens, sequence.limit)


@pytest.mark.parametrize("short", [0, 1])
def test_a_sequence_waits_for_pages_of_each_kind(short: int):
    kinds = [PageKind(PagePool(40), PAGE), PageKind(PagePool(40), PAGE, 6)]
    scheduler = Scheduler(4, kinds, ROWS)
    scheduler.add(Sequence((0, 0), [1] * 27, 30))
    # With one more token 7 pages of the one kind; of the other those of 6 + 12 tokens and one more.
    needed = kinds[short].at_once(28, ROWS)
    assert needed == (7, 6)[short]
    others = kinds[short].take(39 - needed + 1)
    assert not scheduler.plan()
    assert not scheduler.running
    kinds[short].release(others[:1])
    assert len(scheduler.plan()) == ROWS


def test_idle_pages_that_a_sequence_shares_are_no_room_for_its_others():
    kind = PageKind(PagePool(7), PAGE)
    scheduler = Scheduler(4, [kind], ROWS)
    scheduler.add(Sequence((0, 0), [1] * 17, 18, START))
    scheduler.plan()
    scheduler.plan()
    scheduler.end(scheduler.running[0])
    # Four of six pages are known, and one is another's: of 21 tokens two more are needed.
    [other] = kind.take(1)
    scheduler.add(Sequence((0, 1), [1] * 20, 21, START))
    assert not scheduler.plan()
    assert not scheduler.running
    kind.release([other])
    assert len(scheduler.plan()) == 4

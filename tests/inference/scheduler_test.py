"""Every token is written after its predecessors, in pages that keep theirs; no page or slot is
lost, whatever arrives, ends or is preempted.
"""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from research.inference.pages import PagePool, chain_start
from research.inference.scheduler import Scheduler
from research.inference.sequence import Row, Sequence

PAGE = 4
START = chain_start({})


def drawn(tokens: list[int]) -> int:
    """The token that a sequence goes on with: a function of all of its tokens."""
    return hash(tuple(tokens)) % 7


class Device:
    """What is in the pages, and the newest token of each slot."""

    def __init__(self, window: int):
        self.pages: dict[tuple[int, int], list[int]] = {}
        self.newest: dict[int, int] = {}
        self._window = window

    def run(self, rows: list[Row], tables: list[list[int]]) -> list[int | None]:
        found: list[int | None] = []
        right: dict[int, bool] = {}
        for row, pages in zip(rows, tables, strict=True):
            history = self._read(row, pages)
            self.pages[pages[row.position // PAGE], row.position % PAGE] = history
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

    def _read(self, row: Row, pages: list[int]) -> list[int]:
        """The tokens up to a row, of the slots that it attends to."""
        token = self.newest[row.slot] if row.token is None else row.token
        first = max(row.position - self._window + 1, 0) if self._window else 0
        # Each slot holds the token, and all those before it, that gave its keys.
        kept = [
            self.pages[pages[position // PAGE], position % PAGE]
            for position in range(first, row.position)
        ]
        history = [*kept[-1], token] if kept else [token]
        for position, each in enumerate(kept, first):
            assert each == history[: position + 1], "the keys are of other tokens"
        return history


def is_alive(scheduler: Scheduler, sequence: Sequence) -> bool:
    return sequence in scheduler.running or sequence in scheduler.waiting


def read(scheduler: Scheduler, step: tuple[list[Row], list[int | None]]) -> None:
    """What the host makes of a step."""
    found: dict[Sequence, list[int]] = {}
    for row, token in zip(*step, strict=True):
        if token is not None and is_alive(scheduler, row.sequence):
            found.setdefault(row.sequence, []).append(token)
    for sequence, tokens in found.items():
        sequence.add(tokens)
        if len(sequence.tokens) >= sequence.limit:
            scheduler.end(sequence)


def guess(scheduler: Scheduler, draws: random.Random) -> None:
    """Gives some answers guesses, some of which are right."""
    for sequence in scheduler.running:
        room = min(sequence.limit - 1 - sequence.length, 2)
        if not sequence.is_answering or room < 1:
            continue
        text = list(sequence.tokens)
        for _ in range(room):
            text.append(drawn(text) if draws.random() < 0.6 else 9)
        sequence.drafts = tuple(text[len(sequence.tokens) :])


def serve(
    scheduler: Scheduler,
    arrivals: list[list[Sequence]],
    aborted: set[int],
    window: int = 0,
    draws: random.Random | None = None,
) -> int:
    """Runs all sequences to their end, those of `aborted` for a few steps, with guesses where there
    are `draws`; returns the steps.
    """
    device = Device(window)
    under_way: list[tuple[list[Row], list[int | None]]] = []
    steps = 0
    while arrivals or scheduler.waiting or scheduler.running or under_way:
        for sequence in arrivals.pop(0) if arrivals else []:
            scheduler.add(sequence)
        has_drafts = any(sequence.drafts for sequence in scheduler.running)
        guesses = draws is not None and (has_drafts or draws.random() < 0.7)
        for sequence in scheduler.running:
            sequence.needs_host = guesses
        if guesses:
            while under_way:
                read(scheduler, under_way.pop(0))
            guess(scheduler, draws)
        rows = scheduler.plan()
        assert len(rows) <= 12
        tables = [list(row.sequence.pages) for row in rows]
        owned = [page for each in scheduler.running for page in each.pages if page]
        assert all(scheduler.pool.owners(page) == owned.count(page) for page in set(owned))
        if rows:
            under_way.append((rows, device.run(rows, tables)))
        steps += 1
        assert steps < 2000

        # The host reads a step when the next one has been planned.
        if len(under_way) > 1 or (under_way and not rows):
            read(scheduler, under_way.pop(0))
        for sequence in list(scheduler.running):
            if sequence.order[1] in aborted and steps % 5 == 0:
                scheduler.end(sequence)
    return steps


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    num_pages=st.integers(12, 40),
    shares=st.booleans(),
    window=st.sampled_from([0, 0, 6]),
    guesses=st.booleans(),
)
def test_any_requests_are_answered_as_alone(
    seed: int, num_pages: int, shares: bool, window: int, guesses: bool
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

    pool = PagePool(num_pages)
    scheduler = Scheduler(4, pool, PAGE, 12, window)
    serve(scheduler, arrivals, aborted, window, draws if guesses else None)
    assert pool.available == num_pages - 1
    for sequence, prompt in sequences:
        if sequence.order[1] in aborted:
            continue
        alone = list(prompt)
        while len(alone) < sequence.limit:
            alone.append(drawn(alone))
        assert sequence.tokens[: sequence.limit] == alone

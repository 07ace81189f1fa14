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

    def __init__(self):
        self.pages: dict[tuple[int, int], list[int]] = {}
        self.newest: dict[int, int] = {}

    def run(self, rows: list[Row], tables: list[list[int]]) -> list[int | None]:
        found = []
        for row, pages in zip(rows, tables, strict=True):
            before = []
            for position in range(row.position):
                # Each slot holds the token, and all those before it, that gave its keys.
                history = self.pages[pages[position // PAGE], position % PAGE]
                before.append(history[-1])
                assert history == before, "the keys are of other tokens"
            token = self.newest[row.slot] if row.token is None else row.token
            history = [*before, token]
            self.pages[pages[row.position // PAGE], row.position % PAGE] = history
            result = None
            if row.draws:
                result = drawn(history)
                self.newest[row.slot] = result
            found.append(result)
        return found


def is_alive(scheduler: Scheduler, sequence: Sequence) -> bool:
    return sequence in scheduler.running or sequence in scheduler.waiting


def serve(scheduler: Scheduler, arrivals: list[list[Sequence]], aborted: set[int]) -> int:
    """Runs all sequences to their end, those of `aborted` for a few steps; returns the steps."""
    device = Device()
    under_way: list[tuple[list[Row], list[int | None]]] = []
    steps = 0
    while arrivals or scheduler.waiting or scheduler.running or under_way:
        for sequence in arrivals.pop(0) if arrivals else []:
            scheduler.add(sequence)
        rows = scheduler.plan()
        assert len(rows) <= 12
        tables = [list(row.sequence.pages) for row in rows]
        owned = [page for each in scheduler.running for page in each.pages]
        assert all(scheduler.pool.owners(page) == owned.count(page) for page in set(owned))
        if rows:
            under_way.append((rows, device.run(rows, tables)))
        steps += 1
        assert steps < 2000

        # The host reads a step when the next one has been planned.
        if len(under_way) > 1 or (under_way and not rows):
            read, tokens = under_way.pop(0)
            for row, token in zip(read, tokens, strict=True):
                sequence = row.sequence
                if token is None or not is_alive(scheduler, sequence):
                    continue
                sequence.tokens.append(token)
                if len(sequence.tokens) == sequence.limit:
                    scheduler.end(sequence)
        for sequence in list(scheduler.running):
            if sequence.order[1] in aborted and steps % 5 == 0:
                scheduler.end(sequence)
    return steps


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), num_pages=st.integers(12, 40), shares=st.booleans())
def test_any_requests_are_answered_as_alone(seed: int, num_pages: int, shares: bool):
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
    serve(Scheduler(4, pool, PAGE, 12), arrivals, aborted)
    assert pool.available == num_pages - 1
    for sequence, prompt in sequences:
        if sequence.order[1] in aborted:
            continue
        alone = list(prompt)
        while len(alone) < sequence.limit:
            alone.append(drawn(alone))
        assert sequence.tokens == alone

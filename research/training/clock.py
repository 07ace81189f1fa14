"""How a run spends its time: exclusive categories that sum to the wall time."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, get_args

Category = Literal["compute", "data", "checkpoint", "evaluation", "compile"]
OTHER = "other"


class Clock:
    """Counts all time from its creation to `stop`, each moment in one category or in `other`.

    JAX computes asynchronously: a block of "compute" must wait for its result, or the time is
    counted in the block that does.

    Args:
      now: returns seconds; monotonic.
    """

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self._now = now
        self._seconds: dict[str, float] = dict.fromkeys((*get_args(Category), OTHER), 0.0)
        self._current: str = OTHER
        self._since = now()
        self._stopped = False

    @contextmanager
    def measure(self, category: Category) -> Iterator[None]:
        """Counts the time of its block in `category`; a block inside of it pauses it."""
        assert category in get_args(Category), category
        outer = self._switch(category)
        try:
            yield
        finally:
            self._switch(outer)

    def stop(self) -> None:
        """Ends the counting; idempotent."""
        self._switch(OTHER)
        self._stopped = True

    def seconds(self) -> dict[str, float]:
        """Returns the seconds of each category so far, `other` last; their sum is the wall time."""
        # Nothing changes but that the time of the current category is counted up to now.
        self._switch(self._current)
        return dict(self._seconds)

    def report(self) -> str:
        """Returns one line such as `wall 120.0 s: compute 96.1 %, data 0.4 %, …, other 0.2 %`."""
        seconds = self.seconds()
        # The categories exclude each other, so that together they are all of the time.
        wall = sum(seconds.values())
        shares = (
            f"{category} {100 * spent / max(wall, 1e-9):.1f} %"
            for category, spent in seconds.items()
        )
        return f"wall {wall:.1f} s: {', '.join(shares)}"

    def _switch(self, category: str) -> str:
        """Counts the time so far, and from now on in `category`; returns the category before."""
        before = self._current
        # One reading ends a category and begins the next: no time between them is lost.
        now = self._now()
        if not self._stopped:
            self._seconds[before] += now - self._since
        self._current = category
        self._since = now
        return before

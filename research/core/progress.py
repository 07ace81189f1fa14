"""Progress of long work: a bar with an ETA on a terminal, plain lines elsewhere."""

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import tqdm

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0

logger = logging.getLogger("tessera")


class Progress:
    """Counts units of work towards a total, which may be an estimate, or None; a context manager.

    On a terminal it draws a bar. On a pipe it logs a line with rate and ETA at most every few
    seconds, so that short work stays silent; `lines=False` leaves that to work that logs of its
    own.
    """

    def __init__(self, label: str, total: int | None, unit: str = "it", lines: bool = True):
        self._label, self._total, self._unit, self._lines = label, total, unit, lines
        self._done, self._start = 0, time.monotonic()
        self._said = self._start
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm.tqdm(
                desc=label, total=total, unit=unit, unit_scale=True, dynamic_ncols=True, leave=False
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, amount: int = 1) -> None:
        """Adds `amount` units."""
        self._done += amount
        if self._bar is not None:
            self._bar.update(amount)
            return
        now = time.monotonic()
        if self._lines and now - self._said >= SECONDS_BETWEEN_LINES:
            self._said = now
            logger.info("%s", self._line(now - self._start))

    def _line(self, seconds: float) -> str:
        rate = self._done / max(seconds, 1e-9)
        if self._total is None:
            return f"{self._label}: {self._done:,} {self._unit}, {rate:,.0f} {self._unit}/s"
        left = max(self._total - self._done, 0) / max(rate, 1e-9)
        done = f"{self._done:,} of {self._total:,} {self._unit}"
        return f"{self._label}: {done}, {rate:,.0f} {self._unit}/s, ETA {left:.0f} s"


def track(
    items: Iterable[T], label: str, total: int | None = None, unit: str = "it"
) -> Iterator[T]:
    """Yields `items` and shows how far they are."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with Progress(label, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()

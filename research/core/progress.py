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

    On a terminal it draws a bar. Elsewhere it logs a line with rate and ETA at most once in
    `SECONDS_BETWEEN_LINES`, so that short work logs nothing; `lines=False` is for work that logs
    its own lines.
    """

    def __init__(self, label: str, total: int | None, unit: str = "it", lines: bool = True):
        self._label = label
        self._total = total
        self._unit = unit
        self._lines = lines
        self._done = 0
        self._start = time.monotonic()
        self._last_line = self._start
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
        line_is_due = now - self._last_line >= SECONDS_BETWEEN_LINES
        if self._lines and line_is_due:
            self._last_line = now
            logger.info("%s", self._line(now - self._start))

    def _line(self, seconds: float) -> str:
        """Returns a line such as `tokenizing: 300 of 900 documents, 10 documents/s, ETA 60 s`."""
        unit = self._unit
        per_second = self._done / max(seconds, 1e-9)
        done = f"{self._done:,}"
        eta = ""
        if self._total is not None:
            done = f"{done} of {self._total:,}"
            # More may be done than an estimated total.
            remaining = max(self._total - self._done, 0)
            seconds_left = remaining / max(per_second, 1e-9)
            eta = f", ETA {seconds_left:.0f} s"
        return f"{self._label}: {done} {unit}, {per_second:,.0f} {unit}/s{eta}"


def track(
    items: Iterable[T], label: str, total: int | None = None, unit: str = "it"
) -> Iterator[T]:
    """Yields `items` and shows the progress."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with Progress(label, total, unit) as progress:
        for item in items:
            yield item
            progress.advance()

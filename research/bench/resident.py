"""How much memory a piece of work takes at most."""

import pathlib
from collections.abc import Callable
from typing import TypeVar

import psutil

from research.core.errors import UserError

_STATUS = pathlib.Path("/proc/self/status")
_CLEAR = pathlib.Path("/proc/self/clear_refs")
# Linux then counts the peak of resident memory from what is resident now.
_RESET_PEAK = "5"

Result = TypeVar("Result")


def is_measurable() -> bool:
    """Returns whether this system tells it."""
    return _STATUS.exists() and _CLEAR.exists()


def measure_peak(work: Callable[[], Result]) -> tuple[Result, int]:
    """Returns what some work gives, and the most bytes that were resident while it ran, beside
    those that were before.

    Raises:
      UserError: this system does not tell.
    """
    if not is_measurable():
        raise UserError("the peak of a process's memory is read from Linux's /proc.")
    before = psutil.Process().memory_info().rss
    _CLEAR.write_text(_RESET_PEAK)
    result = work()
    # VmHWM:     123456 kB
    lines = _STATUS.read_text().splitlines()
    [line] = [line for line in lines if line.startswith("VmHWM:")]
    _, kilobytes, _ = line.split()
    peak = 1024 * int(kilobytes)
    return result, peak - before

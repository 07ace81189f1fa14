"""Silences what Orbax and TensorStore print of a failed write while one is under way.

They report it many times, each a page of traceback: Orbax in its log, asyncio for each other array,
TensorStore from threads whose event loop was closed at the first error. `Checkpoints.wait` raises
the same error, which is one line.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Any

_under_way = 0
_hook_before: Any = None


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Silences them while the context is open; such contexts may overlap."""
    _start()
    try:
        yield
    finally:
        _stop()


def _start() -> None:
    global _under_way, _hook_before
    if _under_way == 0:
        _hook_before = sys.unraisablehook
        sys.unraisablehook = _report_unraisable
        logging.getLogger("absl").addFilter(_keep_orbax_record)
        logging.getLogger("asyncio").addFilter(_keep_asyncio_record)
    _under_way += 1


def _stop() -> None:
    global _under_way
    _under_way -= 1
    # Of overlapping contexts the last to end restores what was before the first.
    if _under_way == 0:
        sys.unraisablehook = _hook_before
        logging.getLogger("absl").removeFilter(_keep_orbax_record)
        logging.getLogger("asyncio").removeFilter(_keep_asyncio_record)


def _report_unraisable(unraisable: Any) -> None:
    """Reports an error that nobody can catch, but for those of threads whose loop was closed."""
    loop_closed = (
        isinstance(unraisable.exc_value, RuntimeError)
        and str(unraisable.exc_value) == "Event loop is closed"
    )
    if not loop_closed:
        _hook_before(unraisable)


def _keep_orbax_record(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "/orbax/" in record.pathname)


def _keep_asyncio_record(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not ("exception was never retrieved" in message and "orbax" in message)

"""What Orbax and TensorStore print of a write that failed is silenced while one is under way.

They tell it many times, a page of traceback each: Orbax in its log, asyncio of each other array,
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
    """Silences them while the context lasts; such contexts may overlap."""
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
    if _under_way == 0:
        sys.unraisablehook = _hook_before
        logging.getLogger("absl").removeFilter(_keep_orbax_record)
        logging.getLogger("asyncio").removeFilter(_keep_asyncio_record)


def _report_unraisable(unraisable: Any) -> None:
    closed = (
        isinstance(unraisable.exc_value, RuntimeError)
        and str(unraisable.exc_value) == "Event loop is closed"
    )
    if not closed:
        _hook_before(unraisable)


def _keep_orbax_record(record: logging.LogRecord) -> bool:
    return not (record.exc_info and "/orbax/" in record.pathname)


def _keep_asyncio_record(record: logging.LogRecord) -> bool:
    said = record.getMessage()
    return not ("exception was never retrieved" in said and "orbax" in said)

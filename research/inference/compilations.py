"""Compilations of an engine: all before its first step. A later one holds up every answer, so it is
logged as an error.
"""

import contextlib
import contextvars
import functools
import logging
from collections.abc import Iterator

from jax import monitoring

# JAX records the seconds of each compilation under this name.
COMPILED = "/jax/core/compile/backend_compile_duration"

logger = logging.getLogger("tessera")
_serves = contextvars.ContextVar("serves", default=False)


@contextlib.contextmanager
def serving() -> Iterator[None]:
    """Logs each compilation inside as an error."""
    _listen()
    token = _serves.set(True)
    try:
        yield
    finally:
        _serves.reset(token)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Logs no compilation inside: it is one that was asked for."""
    token = _serves.set(False)
    try:
        yield
    finally:
        _serves.reset(token)


@functools.cache
def _listen() -> None:
    """Listens to JAX from the first call on."""
    monitoring.register_event_duration_secs_listener(_log)


def _log(event: str, seconds: float, **_: str | int) -> None:
    if event == COMPILED and _serves.get():
        logger.error(
            "a program was compiled while serving, in %.1f s: all answers waited for it", seconds
        )

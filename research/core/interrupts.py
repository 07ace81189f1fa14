"""Ctrl-C and SIGTERM before and after the steps of a run, where each is an exception or an exit.

During the steps it is a flag that the training loop checks (`training.loop`).
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from research.core.errors import Interrupted

# Seconds until a signal whose exception was ignored comes again.
_RETRY_AFTER = 0.05
_WORDS = {signal.SIGINT: b"interrupted", signal.SIGTERM: b"terminated"}


def _exit_at_once(number: int, frame: Any) -> None:
    word = _WORDS[signal.Signals(number)]
    message = b"tessera: " + word + b"\n"
    # A signal handler may run in the middle of a write to `sys.stderr`, hence the plain file.
    os.write(sys.stderr.fileno(), message)
    os._exit(128 + number)


def exit_at_once() -> None:
    """Makes SIGINT and SIGTERM end the process with one line and status 128 + the signal's number.

    It is for the time in which modules are imported: an exception there could be caught by any
    imported module. A signal that the parent process has set to be ignored stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_at_once)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit_at_once)


def restore_default_handlers() -> None:
    """Reverts `exit_at_once`: Ctrl-C raises KeyboardInterrupt again, so that unfinished work is
    cleaned up.
    """
    if signal.getsignal(signal.SIGINT) is _exit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is _exit_at_once:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Terminated(BaseException):
    """SIGTERM came. It unwinds the stack as Ctrl-C does, which removes what is half written."""


def _terminate(number: int, frame: Any) -> None:
    # A second signal must not interrupt the removal.
    signal.signal(number, signal.SIG_IGN)
    raise Terminated


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Makes SIGTERM raise `Terminated` inside of it."""
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextlib.contextmanager
def delayed_signals() -> Iterator[None]:
    """Keeps SIGINT and SIGTERM until its end, so that what it surrounds is not broken off.

    In other threads than the main one it does nothing: Python runs no handler there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came = []

    def keep(number: int, frame: Any) -> None:
        came.append(number)

    # None is a handler that Python has not set, and cannot set again.
    handlers = {number: signal.getsignal(number) for number in _WORDS}
    handlers = {number: handler for number, handler in handlers.items() if handler is not None}
    with contextlib.ExitStack() as stack:
        # Callbacks run in the order of the last one first, each whatever another one raises: all
        # handlers are set again, then each signal comes.
        for number in reversed(handlers):
            stack.callback(_raise_if, number, came)
        for number, handler in handlers.items():
            stack.callback(signal.signal, number, handler)
        for number in handlers:
            signal.signal(number, keep)
        yield


def _raise_if(number: int, came: list[int]) -> None:
    if number in came:
        signal.raise_signal(number)


@contextlib.contextmanager
def retry_ignored_signals() -> Iterator[None]:
    """Sends a signal again where Python ignored the exception that its handler raised.

    A handler runs between two lines of whatever code runs. In a callback of the garbage collector,
    of which JAX has one, or in a `__del__` its exception cannot propagate: Python hands it to
    `sys.unraisablehook` and goes on, and the signal would be lost.
    """
    previous = sys.unraisablehook

    def retry(unraisable: Any) -> None:
        exception = unraisable.exc_value
        if isinstance(exception, KeyboardInterrupt):
            number = signal.SIGINT
        elif isinstance(exception, Terminated | Interrupted):
            number = signal.SIGTERM
        else:
            previous(unraisable)
            return

        if isinstance(exception, Terminated):
            # `_terminate` has made the process ignore SIGTERM.
            signal.signal(signal.SIGTERM, _terminate)
        timer = threading.Timer(_RETRY_AFTER, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    sys.unraisablehook = retry
    try:
        yield
    finally:
        sys.unraisablehook = previous


def exit_without_waiting(status: int) -> None:
    """Ends the process without waiting for its threads.

    A thread may be inside XLA's compiler for minutes; Python would wait for it, or destroy objects
    that it uses.
    """
    for number in _WORDS:
        signal.signal(number, signal.SIG_IGN)
    # Child processes would outlive `os._exit`.
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        # The process that read the stream may have ended.
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(status)

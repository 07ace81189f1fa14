"""Ctrl-C and SIGTERM at the edges of a process: before there is anything to save, and at its end.

In between, a signal is an exception or a flag that the training loop checks (`cli`,
`training.loop`).
"""

import contextlib
import multiprocessing
import os
import signal
import sys
from typing import Any

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

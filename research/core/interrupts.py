"""Ctrl-C and SIGTERM at the edges of a process: before there is anything to save, and at its end.

In between, a signal is an exception or a mark that the training loop looks at (`cli`,
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
    os.write(sys.stderr.fileno(), b"tessera: " + _WORDS[signal.Signals(number)] + b"\n")
    os._exit(128 + number)


def exit_at_once() -> None:
    """From now on a signal ends the process with one line and status 128 + its number.

    For the time while modules are imported: an exception there would surface as any other, out of
    code that other projects have written. A signal that whoever started the process has set to be
    ignored stays ignored.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _exit_at_once)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit_at_once)


def restore_default_handlers() -> None:
    """Takes `exit_at_once` back: from now on Ctrl-C raises KeyboardInterrupt, so that what is half
    done is undone.
    """
    if signal.getsignal(signal.SIGINT) is _exit_at_once:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGTERM) is _exit_at_once:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def exit_without_waiting(status: int) -> None:
    """Ends the process without waiting for its threads.

    A thread may be inside XLA's compiler for minutes; Python would wait for it, or take down what
    it stands on.
    """
    for number in _WORDS:
        signal.signal(number, signal.SIG_IGN)
    for child in multiprocessing.active_children():
        child.terminate()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # who read it has gone
            stream.flush()
    os._exit(status)

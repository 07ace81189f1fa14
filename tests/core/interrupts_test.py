"""A signal counts also where Python ignores the exception of its handler."""

import gc
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from research.core import interrupts
from research.core.errors import Interrupted


@pytest.fixture
def collecting() -> Iterator[list[int]]:
    """Gives a list: the next collection of garbage sends the signals that are in it."""
    numbers: list[int] = []

    def send(phase: str, info: dict[str, int]) -> None:
        while numbers:
            signal.raise_signal(numbers.pop())

    gc.callbacks.append(send)
    yield numbers
    gc.callbacks.remove(send)


def interrupt_run(number: int, frame: Any) -> None:
    raise Interrupted("stopped")


def collect_and_wait(seconds: float) -> None:
    gc.collect()
    time.sleep(seconds)


def test_ctrl_c_during_a_collection_of_garbage_is_raised_after_it(collecting):
    collecting.append(signal.SIGINT)
    with interrupts.retry_ignored_signals(), pytest.raises(KeyboardInterrupt):
        collect_and_wait(60)


def test_sigterm_during_a_collection_of_garbage_is_raised_after_it(collecting):
    collecting.append(signal.SIGTERM)
    with (
        interrupts.terminable(),
        interrupts.retry_ignored_signals(),
        pytest.raises(interrupts.Terminated),
    ):
        collect_and_wait(60)


def test_a_run_that_is_stopped_during_a_collection_of_garbage_ends_after_it(collecting):
    collecting.append(signal.SIGTERM)
    previous = signal.signal(signal.SIGTERM, interrupt_run)
    try:
        with interrupts.retry_ignored_signals(), pytest.raises(Interrupted):
            collect_and_wait(60)
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_a_signal_during_a_collection_is_lost_without_a_retry(collecting, monkeypatch):  # control
    ignored = []
    monkeypatch.setattr(sys, "unraisablehook", lambda event: ignored.append(event.exc_type))
    collecting.append(signal.SIGINT)
    collect_and_wait(0.2)
    assert ignored == [KeyboardInterrupt]


def test_other_ignored_exceptions_are_shown_as_ever(monkeypatch):
    shown = []
    monkeypatch.setattr(sys, "unraisablehook", lambda event: shown.append(event.exc_type))

    class Faulty:
        def __del__(self) -> None:
            raise OSError

    with interrupts.retry_ignored_signals():
        faulty = Faulty()
        del faulty
    assert shown == [OSError]


def test_delayed_signals_come_at_the_end_and_handlers_are_as_before():
    done = []
    handler = signal.getsignal(signal.SIGINT)

    def once() -> None:
        with interrupts.delayed_signals():
            signal.raise_signal(signal.SIGINT)
            done.append("after the signal")

    def nested() -> None:
        with interrupts.delayed_signals():
            once()
            done.append("after the inner end")

    with pytest.raises(KeyboardInterrupt):
        once()
    assert done == ["after the signal"]
    assert signal.getsignal(signal.SIGINT) is handler
    with pytest.raises(KeyboardInterrupt):
        nested()
    assert done == ["after the signal"] * 2 + ["after the inner end"]


def test_of_two_delayed_signals_both_come():
    came = []

    def raising(number: int, frame: Any) -> None:
        came.append(number)
        raise Interrupted("stopped")

    previous = {n: signal.signal(n, raising) for n in (signal.SIGINT, signal.SIGTERM)}

    def both() -> None:
        with interrupts.delayed_signals():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert not came

    try:
        with pytest.raises(Interrupted):
            both()
        assert came == [signal.SIGINT, signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is raising
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def test_signals_of_other_threads_are_not_delayed():
    found = []

    def run() -> None:
        with interrupts.delayed_signals():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGINT)]

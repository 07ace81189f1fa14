"""Sides of a bench: each a process that is asked, in turns with the others, to do its work so many times."""

import contextlib
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


def serve(take: Callable[[], Any]) -> None:
    """Reads counts from the input until it ends; takes so many turns and answers the seconds."""
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            take()
        print(time.perf_counter() - start, flush=True)


def interleave(commands: Mapping[str, Sequence[str]], rounds: int, count: int) -> dict[str, list[float]]:
    """Returns the seconds of each side's rounds, after one that warms up.

    Args:
      commands: a module that calls `serve`, and its arguments, by the side's name.
      rounds: of each side, in turns.
      count: what a side is asked for each time.
    """
    seconds: dict[str, list[float]] = {side: [] for side in commands}
    with contextlib.ExitStack() as stack:
        workers = {side: stack.enter_context(worker(command)) for side, command in commands.items()}
        for turn in range(rounds + 1):
            for side, ask in workers.items():
                taken = ask(count)
                if turn:
                    seconds[side].append(taken)
    return seconds


@contextlib.contextmanager
def worker(command: Sequence[str], root: pathlib.Path | None = None) -> Iterator[Callable[[int], float]]:
    """Starts a side in a process of its own, and gives a function that asks it and returns the seconds.

    Args:
      command: a module that calls `serve`, and its arguments.
      root: the checkout whose module it is; None is the one that is running.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root
    )

    def ask(count: int) -> float:
        process.stdin.write(f"{count}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        assert answer, f"{' '.join(command)} stopped"
        return float(answer)

    try:
        yield ask
    finally:
        process.stdin.close()
        process.wait()


def spread(values: list[float], digits: int) -> str:
    """Returns the median with the lowest and highest value."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"

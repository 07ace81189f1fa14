"""Sides of a bench: processes that each repeat their work a number of times when asked, interleaved
with the others.
"""

import contextlib
import functools
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from research.core.errors import UserError

Answer = TypeVar("Answer")


def serve(take: Callable[[], Any]) -> None:
    """Reads counts from stdin until it ends; calls `take` that often and prints the seconds."""
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            take()
        print(time.perf_counter() - start, flush=True)


def interleave_calls(
    sides: Mapping[str, Callable[[], Answer]], rounds: int
) -> dict[str, list[Answer]]:
    """Calls each side once a round, and returns its answers after a first round, which warms up.

    The order alternates (A B, B A, …), since the first side changes the machine for the second.
    """
    # Round 0 warms up: its answers do not count.
    answers: dict[str, list[Answer]] = {side: [] for side in sides}
    for index in range(rounds + 1):
        order = reversed(sides) if index % 2 else sides
        for side in order:
            answer = sides[side]()
            if index:
                answers[side].append(answer)
    return answers


def interleave_workers(
    commands: Mapping[str, Sequence[str]], rounds: int, count: int
) -> dict[str, list[float]]:
    """Returns the seconds of each side's rounds, interleaved with the others.

    Args:
      commands: a module that calls `serve`, and its arguments, by the side's name.
      rounds: of each side, after one that warms up.
      count: what a side is asked for each time.
    """
    with contextlib.ExitStack() as stack:
        workers = {side: stack.enter_context(worker(command)) for side, command in commands.items()}
        sides = {side: functools.partial(ask, count) for side, ask in workers.items()}
        return interleave_calls(sides, rounds)


@contextlib.contextmanager
def worker(
    command: Sequence[str], root: pathlib.Path | None = None
) -> Iterator[Callable[[int], float]]:
    """Starts a side in its own process, and yields a function that sends it a count and returns
    its seconds.

    Args:
      command: a module that calls `serve`, and its arguments.
      root: the checkout whose module it is; None is the one that is running.

    Raises:
      UserError: the process ended before it answered.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    )

    def ask(count: int) -> float:
        # Where the process has ended, its answer is missing.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(f"{count}\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise process_error(command, process.wait())
        return float(answer)

    # The end of its input ends a side.
    try:
        yield ask
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        process.wait()


def run(
    command: Sequence[str],
    root: pathlib.Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> str:
    """Runs a side to its end, and returns what it prints; errors as of `worker`.

    Args:
      command, root: as of `worker`.
      variables: of its environment, beside those of this process.
    """
    environment = {**os.environ, **(variables or {})}
    found = subprocess.run(
        [sys.executable, "-m", *command],
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env=environment,
    )
    if found.returncode:
        raise process_error(command, found.returncode)
    return found.stdout


def process_error(command: Sequence[str], status: int) -> UserError:
    """Returns the error of a side whose process ended with a status, or by the signal of a negative
    one.
    """
    name = " ".join(map(str, command))
    if status < 0:
        killer = signal.Signals(-status).name
        return UserError(
            f"the side `{name}` was killed by {killer}; the system kills a process that needs more "
            "memory than there is."
        )
    return UserError(f"the side `{name}` ended with status {status}.")

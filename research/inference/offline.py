"""Answers to the lines of a file of any size, a window of it at a time."""

import codecs
import collections
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.inference.answers import Answer
from research.inference.batch_answers import answer_value, error_value
from research.inference.batch_lines import BatchLine, unexpected
from research.inference.engine import Engine
from research.kernels.decode_attention import PAGE_SIZE
from research.storage.paths import Path

# What is read ahead of what is answered, at most: lines, and their bytes.
WINDOW_LINES = 2048
WINDOW_BYTES = 2**25
# Bytes of a line, at most.
LONGEST_LINE = 2**24
_BLOCK = 2**20

Write = Callable[[dict[str, Any]], None]


def file_digest(path: Path) -> tuple[str, int]:
    """Returns the SHA-256 of a file, and how many lines it has."""
    digest = hashlib.sha256()
    lines = 0
    last = b"\n"
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            lines += block.count(b"\n")
            last = block[-1:]
    return digest.hexdigest(), lines + (last != b"\n")


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Yields the lines of a file with their numbers, from 1, but for blank ones; None is a line of
    more than `LONGEST_LINE` bytes.
    """
    number = 0
    with path.open("rb") as file:
        # Some editors begin a file of UTF-8 with a byte order mark.
        start = file.read(len(codecs.BOM_UTF8))
        if start != codecs.BOM_UTF8:
            file.seek(0)
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            is_long = len(line) > LONGEST_LINE
            while is_long and line and not line.endswith(b"\n"):
                line = file.readline(_BLOCK)
            if is_long:
                yield number, None
            elif line.strip():
                yield number, line


def answer_lines(
    engine: Engine,
    tokenizer: Tokenizer,
    lines: Iterable[tuple[BatchLine, int]],
    write: Write,
) -> None:
    """Answers lines in an order that suits the engine, each once.

    Args:
      engine: that answers.
      tokenizer: of its model.
      lines: each with its bytes; they are read as they are needed.
      write: is called with the answer to each.
    """
    waiting: collections.deque[BatchLine] = collections.deque()
    running: dict[Answer, BatchLine] = {}
    # So many that a slot that becomes free finds the next one, and pages of prompts are shared.
    most = 2 * engine.serve.slots * len(engine.replicas)
    source = iter(lines)
    is_empty = False
    while waiting or running or not is_empty:
        if len(waiting) < most and not is_empty:
            window = _take_window(source)
            is_empty = not window
            for line in window:
                if line.error is not None:
                    write(error_value(line, line.error))
            waiting.extend(in_order([line for line in window if line.error is None]))
        while waiting and len(running) < most:
            line = waiting.popleft()
            try:
                running[engine.submit(line.request)] = line
            except UserError as error:
                write(error_value(line, error.text(line.names)))
            except Exception as error:
                # Of this line alone: the others go on.
                write(error_value(line, unexpected(line.number, error)))
        if running:
            engine.run_step()
        for answer in [each for each in running if each.finished]:
            write(answer_value(running.pop(answer), answer, tokenizer))


def _take_window(source: Iterator[tuple[BatchLine, int]]) -> list[BatchLine]:
    window = []
    total = 0
    for line, size in source:
        window.append(line)
        total += size
        if len(window) == WINDOW_LINES or total >= WINDOW_BYTES:
            break
    return window


def in_order(lines: Sequence[BatchLine]) -> list[BatchLine]:
    """Returns lines in the order that they are answered in: those that begin with the same page
    follow each other, and the longest come first, so that none of them is left alone at the end.
    """
    groups: dict[tuple[Any, ...], list[BatchLine]] = {}
    for line in lines:
        start = (line.request.salt, line.request.ids[:PAGE_SIZE])
        groups.setdefault(start, []).append(line)

    def longest(group: list[BatchLine]) -> int:
        return max(len(line.request.ids) + line.request.max_tokens for line in group)

    ordered = []
    for group in sorted(groups.values(), key=longest, reverse=True):
        # Those with more than a page in common are neighbours.
        ordered += sorted(group, key=lambda line: line.request.ids)
    return ordered

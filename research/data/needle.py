"""Needles in a haystack: lines that are hidden in a long text, and that its end asks for.

A needle is a line such as `[KQXB]`: a letter, its key, and three more, its value. A document of
the source `needle` hides three in sentences that repeat, and names one to three of them again at
its end, in another order: nothing but the needle tells its value there. No letter occurs twice in a
document's needles, so that a small model learns to find them: to copy what followed the same letter
before is enough.

Source: the passkeys of Mohtashami & Jaggi 2023, arXiv:2305.16300, section 4.2, whose sentences
these are, with several keys as in RULER (Hsieh et al. 2024, arXiv:2404.06654, section 3.1).
"""

import random
import string
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# Without capitals, which are for the needles.
NOISE = "the grass is green. the sky is blue. the sun is yellow. here we go. there and back again. "
VALUE_LETTERS = 3
# Needles of a document: the others distract from the one that a question asks for.
NUM_NEEDLES = 3


class Needle(NamedTuple):
    """What is hidden.

    Attributes:
      key: by which a question names it.
      value: which only the needle tells.
    """

    key: str
    value: str

    @property
    def line(self) -> str:
        """The needle as it stands in the text."""
        return f"{self.question}{self.value}]\n"

    @property
    def question(self) -> str:
        """What the value follows, at the end of the text."""
        return f"\n[{self.key}"


# Characters of one needle, and those of a document beside its text.
LINE_LENGTH = len(Needle("K", "V" * VALUE_LETTERS).line)
OVERHEAD = 2 * NUM_NEEDLES * LINE_LENGTH


def draw_needles(draws: random.Random, count: int = NUM_NEEDLES) -> list[Needle]:
    """Returns needles in which no letter occurs twice."""
    # `random()` alone gives the same numbers in every version of Python.
    letters = "".join(sorted(string.ascii_uppercase, key=lambda letter: draws.random()))
    needles = []
    size = 1 + VALUE_LETTERS
    for start in range(0, count * size, size):
        needles.append(Needle(letters[start], letters[start + 1 : start + size]))
    return needles


def noise(draws: random.Random, size: int) -> str:
    """Returns so many characters of the sentences, which begin anywhere."""
    start = int(draws.random() * len(NOISE))
    repeated = NOISE * (2 + size // len(NOISE))
    return repeated[start : start + size]


def hide(text: str, needles: Sequence[Needle], depths: Sequence[float]) -> str:
    """Returns the text with each needle at its depth: 0 is the beginning, 1 the end."""
    # 100 characters, depths 0.5, 0.2 -> text[:20], needle 1, text[20:50], needle 0, text[50:]
    parts = []
    start = 0
    for depth, needle in sorted(zip(depths, needles, strict=True)):
        end = round(depth * len(text))
        parts += [text[start:end], needle.line]
        start = end
    return "".join([*parts, text[start:]])


def documents(count: int, length: int) -> Iterator[str]:
    """Yields documents of `length` bytes, each with needles in it and one to all of them once more,
    in another order, at its end.

    Args:
      count: of the documents.
      length: of each, above `OVERHEAD`.
    """
    for index in range(count):
        draws = random.Random(f"{length}:{index}")
        needles = draw_needles(draws)
        order = sorted(needles, key=lambda needle: draws.random())
        # Where the first question stands, tells nothing.
        asked = order[: 1 + int(draws.random() * len(order))]
        num_lines = len(needles) + len(asked)
        text = noise(draws, length - num_lines * LINE_LENGTH)
        # One in eight lies at the very end, where few others do.
        depths = [min(1.0, draws.random() * 8 / 7) for _ in needles]
        yield hide(text, needles, depths) + "".join(needle.line for needle in asked)

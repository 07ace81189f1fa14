"""Needles in a haystack: lines that are hidden in text, and that questions at its end ask for.

A needle is `[KEYVAL]` on a line of its own: three letters or digits that name it, and three that
nothing else tells. A document of the source `needle` hides several in
a window of the embedded corpus, and then repeats each of them, in another order: to predict a
value there, a model must find its needle.

Source: the passkeys of Mohtashami & Jaggi 2023, arXiv:2305.16300, section 4.2, with several keys
as in RULER (Hsieh et al. 2024, arXiv:2404.06654, section 3).
"""

import random
import string
from collections.abc import Iterator, Sequence
from typing import NamedTuple

# The text has few of them, so that a needle is told from it.
LETTERS = string.ascii_uppercase + string.digits
KEY_LETTERS = 3
VALUE_LETTERS = 3
# Needles of a document: the others distract from the one that a question asks for.
NUM_NEEDLES = 4


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


# Bytes of one needle.
LINE_BYTES = len(Needle("K" * KEY_LETTERS, "V" * VALUE_LETTERS).line)
# Bytes of a document beside its text.
OVERHEAD = 2 * NUM_NEEDLES * LINE_BYTES


def draw_needles(draws: random.Random, count: int = NUM_NEEDLES) -> list[Needle]:
    """Returns needles with different keys."""
    values: dict[str, str] = {}
    while len(values) < count:
        key = _word(draws, KEY_LETTERS)
        values[key] = _word(draws, VALUE_LETTERS)
    return [Needle(key, value) for key, value in values.items()]


def _word(draws: random.Random, length: int) -> str:
    # `random()` alone gives the same numbers in every version of Python.
    return "".join(LETTERS[int(draws.random() * len(LETTERS))] for _ in range(length))


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


def windows(text: str, length: int) -> Iterator[str]:
    """Yields the parts of a text, of `length` bytes each; what is left at its end is dropped."""
    data = text.encode("utf-8")
    for start in range(0, len(data) - length + 1, length):
        # A character that a window cuts in two is left out.
        yield data[start : start + length].decode("utf-8", "ignore")


def documents(name: str, text: str, length: int) -> Iterator[str]:
    """Yields documents of at most `length` bytes, each a window of the text with needles in it and
    all of them once more at its end.

    Args:
      name: of the text; what is hidden depends on it.
      text: where the needles are hidden.
      length: of a document, above `OVERHEAD`.
    """
    for index, window in enumerate(windows(text, length - OVERHEAD)):
        draws = random.Random(f"{name}:{index}")
        needles = draw_needles(draws)
        depths = [draws.random() for _ in needles]
        hidden = hide(window, needles, depths)

        order = sorted(needles, key=lambda needle: draws.random())
        yield hidden + "".join(needle.line for needle in order)

"""Prompt look-up: an answer may repeat what its text says already.

Source: Saxena 2023, "Prompt Lookup Decoding".
"""

from collections.abc import Sequence

# Tokens that a place of the text must share with its end; the longer are tried first.
LONGEST = 4
SHORTEST = 2


class Lookup:
    """The places of the n-grams of one text, which grows.

    Args:
      longest: tokens of an n-gram, at most.
      shortest: tokens of an n-gram, at least.
    """

    def __init__(self, longest: int = LONGEST, shortest: int = SHORTEST):
        self._sizes = range(longest, shortest - 1, -1)
        # An n-gram -> where it ended last, with a token after it.
        self._end_of: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def propose(self, tokens: Sequence[int], count: int) -> list[int]:
        """Returns what followed the newest place that the end of the text repeats, none where there
        is no such place.

        Args:
          tokens: of the text: those of the last call, and more.
          count: of guesses, at most.
        """
        # N-grams that end before the last token: something follows them.
        for end in range(max(self._indexed, 1), len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._end_of[tuple(tokens[end - size : end])] = end
        self._indexed = len(tokens)
        for size in self._sizes:
            # [5, 6, 7, 8, 5, 6] ends with 5 6, which ended at 2: 7 8 5 follow.
            start = self._end_of.get(tuple(tokens[len(tokens) - size :]))
            if start is not None and size <= len(tokens):
                return _repeated(tokens, start, count)
        return []


def _repeated(tokens: Sequence[int], start: int, count: int) -> list[int]:
    """Returns tokens from a start on; past the end those that were just taken follow again."""
    period = len(tokens) - start
    return [tokens[start + index % period] for index in range(count)]

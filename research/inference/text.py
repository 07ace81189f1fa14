"""From new tokens to text: the detokenizer, which also checks for the end of the text."""

import dataclasses
from collections.abc import Sequence

from research.data.tokenizers import StreamDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """One continuation.

    Attributes:
      text: without prompt, and without the stop string unless it was asked for.
      tokens: the new ids, an end id included.
      finish: `stop` for an end id or a stop string, `length` for `max_tokens`.
      stop_match: the stop string or the end id that ended the text; None where none did.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str
    stop_match: str | int | None = dataclasses.field(default=None, kw_only=True)


class Detokenizer:
    """Turns one sequence's new tokens into text, until an end id, a stop string or the last token
    allowed.

    Text is returned as soon as it is certain: pending are the bytes of an unfinished character, and
    the longest suffix that may become a stop string. What `push` and `flush` return adds up to the
    text of the completion. A push costs the same wherever in the text it is.

    Args:
      tokenizer: of the model.
      prompt: ids before the new ones: some tokenizers write the first id of a text differently.
      stop: strings that end the text; they are not part of it. Where one push completes several,
        the one that starts first ends it; of those that start together, the shortest.
      max_tokens: new tokens at most.
      stop_ids: ids that end the text, as the tokenizer's end ids do; none is part of the text.
      include_stop: whether the stop string is part of the text.
      ignore_end: whether the tokenizer's end ids do not end the text.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        stop: Sequence[str],
        max_tokens: int,
        stop_ids: Sequence[int] = (),
        include_stop: bool = False,
        ignore_end: bool = False,
    ):
        self._stop_ids = frozenset(stop_ids)
        if not ignore_end:
            self._stop_ids |= frozenset(tokenizer.end_ids)
        self._unspelt_ids = self._stop_ids | frozenset(tokenizer.end_ids)
        self._max_tokens = max_tokens
        self._include_stop = include_stop
        self._stream = StreamDecoder(tokenizer, prompt)
        self._stops = [StopString(stop_string) for stop_string in stop]

        self._tokens: list[int] = []
        # What was returned, and the suffix of the text that was not.
        self._parts: list[str] = []
        self._pending = ""
        self._stop_match: str | int | None = None
        self._ended = False

    @property
    def finished(self) -> bool:
        """Whether no more tokens are taken."""
        return self._ended

    def push(self, token: int) -> str:
        """Adds a token, unless the text has ended.

        Returns:
          The text that has become certain: with the last token, all that is left.
        """
        if self._ended:
            return ""
        token = int(token)
        self._tokens.append(token)
        if token in self._stop_ids:
            self._stop_match = token
            return self.flush()

        new = ""
        if token not in self._unspelt_ids:
            new = self._check_stops(self._stream.push(token))
        if len(self._tokens) == self._max_tokens:
            new += self.flush()
        return new

    def flush(self) -> str:
        """Ends the text, and returns what is left of it."""
        if self._ended:
            return ""
        # Bytes of a character that no token has completed.
        new = self._check_stops(self._stream.flush())
        if not self._ended:
            self._ended = True
            new += self._returned(self._pending)
            self._pending = ""
        return new

    def _check_stops(self, new: str) -> str:
        """Adds text, ends it at the first stop string, and returns what of it is certain."""
        # pending "a", new "bcd", stop "bc" -> text "abcd", of which "a" stays.
        text = self._pending + new
        self._pending = ""
        found = []
        for stop in self._stops:
            end = stop.push(new)
            if end is not None:
                start = len(text) - len(new) + end - len(stop.text)
                found.append((start, len(stop.text), stop.text))
        if found:
            start, length, self._stop_match = min(found)
            self._ended = True
            if self._include_stop:
                start += length
            return self._returned(text[:start])

        pending = max((stop.matched for stop in self._stops), default=0)
        certain = len(text) - pending
        self._pending = text[certain:]
        return self._returned(text[:certain])

    def _returned(self, text: str) -> str:
        if text:
            self._parts.append(text)
        return text

    def completion(self) -> Completion:
        """Returns the completion; ends the text, where it has not ended, as `max_tokens` would."""
        self.flush()
        finish = "length" if self._stop_match is None else "stop"
        text = "".join(self._parts)
        return Completion(text, tuple(self._tokens), finish, stop_match=self._stop_match)


class StopString:
    """A search for one string in text that arrives in pieces.

    Each character is read once, so the time is linear in the text, whatever the string.

    Source: Knuth, Morris and Pratt 1977, "Fast pattern matching in strings".

    Attributes:
      text: the string, not empty.
      matched: length of the longest suffix of the text so far that the string begins with.
    """

    def __init__(self, text: str):
        self.text = text
        self.matched = 0
        # For each beginning of the string, the longest shorter one that it ends with:
        # "aab" -> "a": 0, "aa": 1, "aab": 0
        self._shorter = [0]
        for letter in text[1:]:
            self._shorter.append(self._extended(self._shorter[-1], letter))

    def _extended(self, matched: int, letter: str) -> int:
        """Returns the length of the longest beginning that `matched` letters and one more end
        with.
        """
        while matched > 0 and self.text[matched] != letter:
            matched = self._shorter[matched - 1]
        if self.text[matched] == letter:
            matched += 1
        return matched

    def push(self, text: str) -> int | None:
        """Reads more text, up to the end of the string.

        Returns:
          Where in this piece the string ends; None where it does not.
        """
        for index, letter in enumerate(text):
            self.matched = self._extended(self.matched, letter)
            if self.matched == len(self.text):
                return index + 1
        return None

"""From new tokens to text: the detokenizer, which also checks for the end of the text."""

import dataclasses
from collections.abc import Sequence

from research.data.tokenizers import StreamDecoder, Tokenizer


@dataclasses.dataclass(frozen=True)
class Completion:
    """One continuation.

    Attributes:
      text: without prompt and stop string.
      tokens: the new ids, an end-of-text id included.
      finish: `stop` for an end-of-text id or a stop string, `length` for `max_tokens`.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str


class Detokenizer:
    """Turns one sequence's new tokens into text, until an end-of-text id, a stop string or the last
    token allowed.

    Args:
      tokenizer: of the model.
      prompt: ids before the new ones: some tokenizers write the first id of a text differently.
      stop: strings that end the text; they are not part of it.
      max_tokens: new tokens at most.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt: Sequence[int], *, stop: Sequence[str], max_tokens: int
    ):
        self._end_ids = tokenizer.end_ids
        self._stop = stop
        self._max_tokens = max_tokens
        self._stream = StreamDecoder(tokenizer)
        for token in prompt:
            self._stream.push(token)
        self._tokens: list[int] = []
        self._text = ""
        self._stopped = False

    @property
    def finished(self) -> bool:
        """Whether no more tokens are taken."""
        return self._stopped or len(self._tokens) == self._max_tokens

    def push(self, token: int) -> None:
        """Adds a token, unless the text has ended."""
        if self.finished:
            return
        self._tokens.append(token)
        if token in self._end_ids:
            # Its spelling, if it has one, is not part of the text.
            self._stopped = True
            return
        self._text += self._stream.push(token)
        self._stopped = self._cut_at_stop()

    def _cut_at_stop(self) -> bool:
        """Cuts the text at the first stop string; returns whether there is one."""
        ends = [self._text.index(stop) for stop in self._stop if stop in self._text]
        if ends:
            self._text = self._text[: min(ends)]
        return bool(ends)

    def completion(self) -> Completion:
        """Returns the text so far."""
        stopped_by_string = self._stopped and self._tokens[-1] not in self._end_ids
        if not stopped_by_string:
            # Bytes of a character that no token has completed.
            self._text += self._stream.flush()
            self._stopped = self._cut_at_stop() or self._stopped
        finish = "stop" if self._stopped else "length"
        return Completion(self._text, tuple(self._tokens), finish)

"""A tokenizer as llguidance reads it: the bytes of each id, and which ids are no text."""

from collections.abc import Sequence
from typing import Any

from research.data.tokenizers import Tokenizer

# A character that no token joins with what follows.
SEPARATOR = "\x02"


def token_bytes(tokenizer: Tokenizer, num_ids: int, end_ids: Sequence[int]) -> list[bytes | None]:
    """Returns the bytes of each id; None for those that no text of a grammar may have."""
    tokens = []
    for i in range(num_ids):
        # An id without bytes would be allowed again and again.
        data = tokenizer.bytes_of(i) or None
        if i in end_ids:
            data = None
        tokens.append(data)
    return tokens


def spells_every_byte(tokenizer: Tokenizer, num_ids: int) -> bool:
    """Whether every text has tokens, whatever its bytes."""
    tokens = token_bytes(tokenizer, num_ids, tokenizer.end_ids)
    return {bytes([byte]) for byte in range(256)} <= set(tokens)


def native_tokenizer(
    library: Any, tokenizer: Tokenizer, num_ids: int, end_ids: Sequence[int]
) -> Any:
    """Returns llguidance's tokenizer.

    Args:
      library: llguidance.
      tokenizer: of the model.
      num_ids: its first ids, which may be drawn.
      end_ids: those that end a text; where there are none, the id after the last stands for the
        end.
    """
    vocabulary = Vocabulary(tokenizer, num_ids, end_ids)
    return library.LLTokenizer(
        library.TokenizerWrapper(vocabulary), eos_token=list(vocabulary.end_ids)
    )


class Vocabulary:
    """What llguidance's `TokenizerWrapper` asks of a tokenizer.

    Attributes:
      tokens: bytes of each id; of a special one its name, which Lark grammars may have in angle
        brackets; of others that are no text none.
      special_token_ids: ids that are no text.
      end_ids: those that end a text.
      eos_token_id: the first of them.
      bos_token_id: not needed, as no prompt is read.
    """

    def __init__(self, tokenizer: Tokenizer, num_ids: int, end_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._separator = tokenizer.encode(SEPARATOR)
        found = token_bytes(tokenizer, num_ids, end_ids)
        # Of ids with the same bytes the last one, a piece and not a byte.
        self._ids = {data: i for i, data in enumerate(found) if data is not None}
        self._longest = max(map(len, self._ids), default=1)
        self._bytes = found

        self.tokens: list[bytes] = []
        self.special_token_ids: list[int] = []
        for i, data in enumerate(found):
            if data is None:
                data = (tokenizer.token_of(i) or "").encode("utf-8")
                self.special_token_ids.append(i)
            self.tokens.append(data)
        self.end_ids = tuple(end_ids)
        if not end_ids:
            self.end_ids = (num_ids,)
            self.special_token_ids.append(num_ids)
            self.tokens.append(b"<end>")
        self.eos_token_id = self.end_ids[0]
        self.bos_token_id = None

    def __call__(self, text: str | bytes) -> list[int]:
        """Returns the tokens of text that a grammar forces, as of text that has begun."""
        data = text if isinstance(text, bytes) else text.encode("utf-8")
        ids = self._tokenizer.encode(SEPARATOR + data.decode("utf-8"))
        if ids[: len(self._separator)] == self._separator:
            ids = ids[len(self._separator) :]
            known = [self._bytes[i] for i in ids if i < len(self._bytes)]
            if None not in known and b"".join(known) == data:
                return ids
        return self._greedy(data)

    def _greedy(self, data: bytes) -> list[int]:
        """Returns the longest token at each place; for tokenizers that change text, and where ids
        may not be drawn.
        """
        ids = []
        start = 0
        while start < len(data):
            for end in range(min(len(data), start + self._longest), start, -1):
                if data[start:end] in self._ids:
                    ids.append(self._ids[data[start:end]])
                    start = end
                    break
            else:
                # No token has this byte.
                start += 1
        return ids

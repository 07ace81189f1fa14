"""Texts as an encoder reads them: one, a pair, or one with masks."""

import abc
from collections.abc import Mapping, Sequence

from research.data.tokenizers import chat


class SourceTexts(abc.ABC):
    """What `Tokenizer` does for encoders; it says what the attributes are."""

    bos_id: int | None
    eos_id: int | None
    prompt_frame: tuple[tuple[int, ...], tuple[int, ...]] | None

    @property
    @abc.abstractmethod
    def specials(self) -> Mapping[str, str]:
        """The spelling of the special tokens, by their roles."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without control ids."""

    @abc.abstractmethod
    def _encode_marked(self, text: str, mark: str) -> list[int]:
        """Encodes text in which a mark before the spelling of a control token makes it that
        token.
        """

    def encode_source(self, text: str) -> list[int]:
        """Returns a text's ids as an encoder reads them: framed by `prompt_frame`, or by BOS and
        EOS where there are such tokens.
        """
        before, after = self._source_frame()
        return [*before, *self.encode(text), *after]

    def encode_pair(self, first: str, second: str) -> tuple[list[int], list[int]]:
        """Returns two texts' ids as an encoder reads a pair, and the type of each: [CLS] first
        [SEP] of type 0, and second [SEP] of type 1.

        Source: Devlin et al. 2019 (BERT), arXiv:1810.04805, figure 2.
        """
        before, after = self._source_frame()
        left = [*before, *self.encode(first), *after]
        right = [*self.encode(second), *after]
        return left + right, [0] * len(left) + [1] * len(right)

    def encode_masked(self, text: str) -> list[int]:
        """Returns `encode_source` of a text in which the spelling of MASK, which there must be, is
        the token.
        """
        name = self.specials["mask"]
        _, mark = chat.unused_characters(name, {"text": text})
        marked = text.replace(name, mark + name)
        before, after = self._source_frame()
        return [*before, *self._encode_marked(marked, mark), *after]

    def _source_frame(self) -> tuple[Sequence[int], Sequence[int]]:
        if self.prompt_frame is not None:
            return self.prompt_frame
        return ids_of(self.bos_id), ids_of(self.eos_id)


def ids_of(token_id: int | None) -> list[int]:
    """Returns [token_id], or [] for None."""
    return [] if token_id is None else [token_id]

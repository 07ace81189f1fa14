"""A tokenizer for models whose weights are random: all of their ids have a text."""

from research.data.tokenizers import ByteTokenizer


class AnyIds(ByteTokenizer):
    """Bytes, and further ids that stand for letters.

    Args:
      vocab_size: of the model.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.vocab_size = vocab_size

    def _decode(self, ids: list[int]) -> str:
        # Control tokens come from the decoder's own callers, never here.
        spelt = [self.bytes_of(i) or b"" for i in ids]
        return b"".join(spelt).decode("utf-8", errors="replace")

    def bytes_of(self, token_id: int) -> bytes | None:
        """Returns the letter of an id that the bytes and their control tokens leave."""
        if token_id < ByteTokenizer().vocab_size:
            return super().bytes_of(token_id)
        return bytes([ord("a") + token_id % 26])

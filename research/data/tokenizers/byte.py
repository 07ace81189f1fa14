"""Bytes as tokens: the 256 bytes of UTF-8, then BOS, EOS and PAD, then MASK and sentinels where
they are wanted.
"""

from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from research.data.tokenizers.base import SENTINEL, Tokenizer, check_sentinels

NAMES = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "mask": "<mask>"}


class ByteTokenizer(Tokenizer):
    """The id of a byte is its value, so any text round-trips."""

    kind: ClassVar[str] = "bytes"
    bos_id, eos_id, pad_id = 256, 257, 258

    def __init__(self, mask: bool = False, sentinels: int = 0):
        """Args: mask: whether there is a MASK, id 259. sentinels: how many, with the ids after
        it.
        """
        check_sentinels(sentinels)
        self.mask_id = 259 if mask else None
        first = 259 + mask
        self.sentinel_ids = tuple(range(first, first + sentinels))
        self.vocab_size = first + sentinels
        names = [*self.specials.values(), *(SENTINEL.format(i) for i in range(sentinels))]
        self._control = {name: 256 + i for i, name in enumerate(names)}
        self._spelt = {256 + i: name.encode() for i, name in enumerate(names)}

    @property
    def specials(self) -> dict[str, str]:
        """The spelling of the tokens that have a part to play, by their `ROLES`."""
        return {
            role: name for role, name in NAMES.items() if role != "mask" or self.mask_id is not None
        }

    @property
    def control_tokens(self) -> dict[str, int]:
        """The ids of all tokens that are no byte."""
        return self._control

    def token_of(self, token_id: int) -> str | None:
        return self._spelt[token_id].decode() if token_id in self._spelt else None

    def id_of(self, token: str) -> int | None:
        if token not in self._control:
            return None
        return self._control[token]

    def _encode_batch(self, texts: list[str]) -> list[Int[np.ndarray, "_"]]:
        return [np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.int32) for text in texts]

    def _decode(self, ids: list[int]) -> str:
        return b"".join(bytes([i]) if i < 256 else self._spelt[i] for i in ids).decode(
            "utf-8", errors="replace"
        )

    def files(self) -> dict[str, bytes]:
        return {}

    def options(self) -> dict[str, Any]:
        return {"mask": self.mask_id is not None, "sentinels": len(self.sentinel_ids)}

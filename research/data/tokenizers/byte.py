"""Bytes as tokens: the 256 bytes of UTF-8, BOS, EOS and PAD, then MASK and sentinels if any."""

from typing import Any, ClassVar

import numpy as np
from jaxtyping import Int

from research.data.tokenizers.base import SENTINEL, Tokenizer, check_sentinels

NAMES = {"bos": "<s>", "eos": "</s>", "pad": "<pad>", "mask": "<mask>"}
NUM_BYTES = 256


class ByteTokenizer(Tokenizer):
    """The id of a byte is its value, so any text round-trips."""

    kind: ClassVar[str] = "bytes"
    bos_id = 256
    eos_id = 257
    pad_id = 258

    def __init__(self, mask: bool = False, sentinels: int = 0):
        """Args: mask: whether there is a MASK, id 259. sentinels: how many, with the ids after
        it.
        """
        check_sentinels(sentinels)
        self.mask_id = 259 if mask else None
        first = 259 + mask
        self.sentinel_ids = tuple(range(first, first + sentinels))
        self.vocab_size = first + sentinels

        # Control tokens in the order of their ids, from 256 on.
        names = list(self.specials.values())
        names += [SENTINEL.format(i) for i in range(sentinels)]
        self._control = {name: i for i, name in enumerate(names, start=NUM_BYTES)}
        self._spelling = {i: name for name, i in self._control.items()}

    @property
    def specials(self) -> dict[str, str]:
        """The spelling of the special tokens, by their `ROLES`."""
        names = dict(NAMES)
        if self.mask_id is None:
            del names["mask"]
        return names

    @property
    def control_tokens(self) -> dict[str, int]:
        """The ids of all tokens that are no byte."""
        return self._control

    def token_of(self, token_id: int) -> str | None:
        return self._spelling.get(token_id)

    def id_of(self, token: str) -> int | None:
        return self._control.get(token)

    def bytes_of(self, token_id: int) -> bytes | None:
        return bytes([token_id]) if token_id < NUM_BYTES else None

    def _encode_batch(self, texts: list[str]) -> list[Int[np.ndarray, "_"]]:
        encoded = []
        for text in texts:
            data = np.frombuffer(text.encode("utf-8"), np.uint8)
            encoded.append(data.astype(np.int32))
        return encoded

    def _decode(self, ids: list[int]) -> str:
        data = bytearray()
        for i in ids:
            if i < NUM_BYTES:
                data.append(i)
            else:
                data += self._spelling[i].encode("utf-8")
        return data.decode("utf-8", errors="replace")

    def files(self) -> dict[str, bytes]:
        return {}

    def options(self) -> dict[str, Any]:
        return {"mask": self.mask_id is not None, "sentinels": len(self.sentinel_ids)}

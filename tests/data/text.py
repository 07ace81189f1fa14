"""Small tokenized corpora for the tests of this folder, and a tokenizer with every control
token.
"""

import pathlib

import numpy as np

from research.data.corpus import Corpus, build_corpora
from research.data.sources import SourceConfig, SourceReport
from research.data.tokenizers.byte import ByteTokenizer


def texts(count: int, seed: int = 1) -> list[str]:
    """Returns distinct texts of very different lengths."""
    return [f"{i}:" + chr(97 + i % 26) * ((i * i * 7919 + seed) % 97) for i in range(count)]


def corpora(
    folder: pathlib.Path, count: int, seed: int = 1, heldout_fraction: float = 0.2
) -> dict[str, Corpus]:
    """Writes `texts` as files and tokenizes them into bytes."""
    source = folder / f"text-{count}-{seed}"
    source.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts(count, seed)):
        (source / f"{i:04}.txt").write_text(text)
    config = SourceConfig(kind="text", path=str(source), heldout_fraction=heldout_fraction)
    return build_corpora(config, ByteTokenizer(), folder / "cache")


class MarkedBytes(ByteTokenizer):
    """Bytes, and the ids that objectives insert."""

    def __init__(self):
        super().__init__()
        self.vocab_size, self.mask_id, self.sentinel_ids = 300, 259, tuple(range(299, 259, -1))


# Above every token of `store`.
BOS, EOS, PAD, MASK, SENTENCE_END, MODE = range(50_000, 50_006)
SENTINELS = tuple(range(50_199, 50_099, -1))
VOCAB = 50_200


def store(lengths: list[int]) -> Corpus:
    """Returns framed documents of these lengths. A token of the text is its index in the store: no
    two are equal.
    """
    documents = []
    index = 0
    for n in lengths:
        documents.append(np.array([BOS, *range(index + 1, index + 1 + n), EOS]))
        index += n + 2
    tokens = np.concatenate(documents).astype(np.uint16)
    assert index < BOS
    offsets = np.concatenate([[0], np.cumsum([n + 2 for n in lengths])])
    return Corpus(
        pathlib.Path("store"), tokens, offsets, np.array(lengths), PAD, "digest", SourceReport()
    )

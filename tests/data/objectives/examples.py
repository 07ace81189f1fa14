"""Packed rows split into segments again, one at a time and in plain Python."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from research.data.corpus import Corpus
from research.data.objectives import Objective, ObjectiveConfig, build
from research.data.packing import PackedRows
from research.data.tokenizers.byte import ByteTokenizer
from tests.data.text import BOS, EOS, MASK, PAD, SENTENCE_END, SENTINELS, VOCAB


class FullTokenizer(ByteTokenizer):
    """Has every id; its texts are the store's."""

    def __init__(self):
        super().__init__()
        self.vocab_size, self.mask_id, self.sentinel_ids = VOCAB, MASK, SENTINELS
        self.bos_id, self.eos_id, self.pad_id = BOS, EOS, PAD

    def encode(self, text: str) -> list[int]:
        assert text.endswith(".")
        return [7, SENTENCE_END]


@dataclasses.dataclass(frozen=True)
class Segment:
    """The arrays of one segment, without padding."""

    tokens: list[int]
    targets: list[int]
    weights: list[float]
    prefix: list[int]
    encoder: list[int]


def objective_of(kind: str, sequence_length: int, **values) -> Objective:
    return build(ObjectiveConfig(kind, **values), FullTokenizer(), sequence_length)


def packed(corpus: Corpus, objective: Objective, seed: int = 0, block: int = 1000) -> PackedRows:
    return PackedRows(corpus, objective=objective, seed=seed, block_documents=block)


def epoch(rows: PackedRows, number: int = 0) -> dict[str, np.ndarray]:
    """Every row of an epoch."""
    return rows.batch(np.arange(len(rows)), np.full(len(rows), number))


def drawn(rows: PackedRows, times: int) -> dict[str, np.ndarray]:
    """The first row, as it is in each of so many epochs."""
    return rows.batch(np.zeros(times, int), np.arange(times))


def segments(batch: dict[str, np.ndarray]) -> Iterator[Segment]:
    """Splits every row into its segments, and checks what every objective promises of a layout."""
    encoded = "encoder_tokens" in batch
    for row in range(len(batch["tokens"])):
        inside = {name: values[row] for name, values in batch.items()}
        check_side(inside, "", inside["targets"])
        if encoded:
            check_side(inside, "encoder_", inside["encoder_tokens"])
            assert set(inside["segments"]) - {0} == set(inside["encoder_segments"]) - {0}
        for segment in range(1, inside["segments"].max() + 1):
            here = inside["segments"] == segment
            there = inside["encoder_segments"] == segment if encoded else None
            yield Segment(
                *(inside[name][here].tolist() for name in ("tokens", "targets", "weights")),
                inside["prefix"][here].tolist() if "prefix" in inside else [],
                inside["encoder_tokens"][there].tolist() if encoded else [],
            )


def check_side(row: dict[str, np.ndarray], side: str, padded: np.ndarray) -> None:
    """Segments count up from 1 in one run each, positions count from 0 in each, and padding is at
    the end.
    """
    segments = row[side + "segments"]
    real = segments[segments > 0]
    assert (segments[: len(real)] > 0).all()
    assert (np.diff(real) >= 0).all()
    assert set(real) == set(range(1, segments.max() + 1))
    for segment in set(real):
        np.testing.assert_array_equal(
            row[side + "positions"][segments == segment], np.arange((real == segment).sum())
        )
    assert (row[side + "tokens"][len(real) :] == PAD).all()
    assert (padded[len(real) :] == PAD).all()
    assert (row["weights"][row["segments"] == 0] == 0).all()


def text_of(corpus: Corpus) -> list[int]:
    """Every token of the documents' texts, in order."""
    return [int(token) for token in corpus.tokens if token < BOS]

"""Objectives of a model without an encoder of its own: causal, prefix, masked.

Causal: a framed document `[bos] t₁ … tₙ [eos]` (`Tokenizer.frame`) gives the pairs (bos → t₁),
(t₁ → t₂), …, (tₙ → eos). A segment is a run of such pairs, so every token of a document but its
first is a target exactly once, however the document was cut, and no position is spent on a token
without a successor. Positions begin at 0 in every segment.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int, Shaped

from research.data.batch import Batch
from research.data.chance import below, choose, fraction, ragged_arange
from research.data.corpus import Corpus
from research.data.objectives.base import Ids, Layout, Objective, Ranges, Segments, interleave
from research.data.objectives.config import MaskedConfig

CHOICE, TREATMENT, REPLACEMENT = range(3)


def bytes_per_target(corpora: Iterable[Corpus]) -> float:
    """Returns the UTF-8 bytes of text that one predicted token stands for: bits per byte = loss /
    ln 2 / this.
    """
    num_bytes, targets = 0, 0
    for corpus in corpora:
        num_bytes += int(corpus.num_bytes.sum())
        targets += int(_pairs(corpus.offsets).sum())
    return num_bytes / max(targets, 1)


def _pairs(offsets: Int[np.ndarray, "_"]) -> Int[np.ndarray, "_"]:
    """Returns the pairs of each framed document: every token but its first is a target."""
    return np.maximum(np.diff(offsets) - 1, 0)


def causal_batch(
    tokens: Shaped[np.ndarray, "_"],
    starts: Int[np.ndarray, "P"],
    lengths: Int[np.ndarray, "P"],
    row_sizes: Int[np.ndarray, "B"],
    sequence_length: int,
    pad_id: int,
) -> Batch:
    """Makes a causal batch from segments of a token store.

    Args:
      tokens: the store; a segment of n pairs reads n + 1 of it.
      starts: where each segment begins in the store.
      lengths: pairs of each segment; the segments of a row fill at most T.
      row_sizes: segments of each row; the segments come row by row.
      sequence_length: T, the width of the rows.
      pad_id: the token that fills the rest of a row.
    """
    source = np.repeat(starts, lengths) + ragged_arange(lengths)
    return Layout(lengths, row_sizes, sequence_length).arrays(
        tokens=(tokens[source], pad_id),
        targets=(tokens[source + 1], pad_id),
        weights=(np.ones(len(source), np.float32), 0.0),
    )


class Causal(Objective):
    """Each token from those before it."""

    def documents(self, offsets: Int[np.ndarray, "_"]) -> Ranges:
        """Returns the pairs of each framed document."""
        lengths = _pairs(offsets)
        return Ranges(offsets[:-1], lengths, np.zeros_like(lengths))

    def widths(
        self, lengths: Int[np.ndarray, "P"], variants: Int[np.ndarray, "P"]
    ) -> Int[np.ndarray, "2 P"]:
        return np.stack([lengths, np.zeros_like(lengths)])

    def batch(self, segments: Segments) -> Batch:
        return causal_batch(
            segments.tokens,
            segments.starts,
            segments.lengths,
            segments.row_sizes,
            self.sequence_length,
            self.ids.pad,
        )


class Prefix(Causal):
    """The rest of a segment from its first p tokens, which see one another in both directions;
    `prefix` marks them.

    p is drawn from 1 … n for a segment of n pairs. A pair has weight where its target is not in the
    prefix.

    Source: Raffel et al. 2020, arXiv:1910.10683, section 3.2.1.
    """

    def batch(self, segments: Segments) -> Batch:
        lengths = segments.lengths
        seen = 1 + below(segments.draws(CHOICE, np.ones_like(lengths)), lengths)
        inside = np.repeat(seen, lengths) - ragged_arange(
            lengths
        )  # above 0: in the prefix; above 1: so is the target
        extra = Layout(lengths, segments.row_sizes, self.sequence_length).arrays(
            prefix=((inside > 0).astype(np.int32), 0),
            weights=((inside <= 1).astype(np.float32), 0.0),
        )
        return super().batch(segments) | {name: extra[name] for name in ("prefix", "weights")}


class Masked(Objective):
    """Hidden tokens of a segment from all others. Which are hidden is drawn anew in every epoch.

    Every segment is framed as a document is; the frame is never hidden. Random tokens are any of
    the vocabulary.

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1; Liu et al. 2019, arXiv:1907.11692,
    section 4.1. Here the number of hidden tokens is rounded in each segment, and at least one.
    """

    def __init__(self, config: MaskedConfig, ids: Ids, sequence_length: int):
        super().__init__(ids, sequence_length)
        self._config = config
        self._framing = int(ids.bos is not None), int(ids.eos is not None)

    def widths(
        self, lengths: Int[np.ndarray, "P"], variants: Int[np.ndarray, "P"]
    ) -> Int[np.ndarray, "2 P"]:
        return np.stack([lengths + sum(self._framing), np.zeros_like(lengths)])

    def batch(self, segments: Segments) -> Batch:
        c = self._config
        text = segments.tokens[segments.token_indices()].astype(np.int64)
        counts = np.maximum(np.rint(segments.lengths * c.density).astype(np.int64), 1)
        hidden = choose(segments.draws(CHOICE), segments.lengths, counts)
        treatment = fraction(segments.draws(TREATMENT)[hidden])
        replacement = below(segments.draws(REPLACEMENT)[hidden], self.ids.vocab_size)
        shown = text.copy()
        shown[hidden] = np.where(
            treatment < c.mask,
            self.ids.mask,
            np.where(treatment < c.mask + c.random, replacement, text[hidden]),
        )
        lengths = self.widths(segments.lengths, segments.variants)[0]
        return Layout(lengths, segments.row_sizes, self.sequence_length).arrays(
            tokens=(self._framed(shown, lengths), self.ids.pad),
            targets=(self._framed(text, lengths), self.ids.pad),
            weights=(self._framed(hidden, lengths, frame=False).astype(np.float32), 0.0),
        )

    def _framed(
        self, text: Shaped[np.ndarray, "_"], lengths: Int[np.ndarray, "P"], frame: bool = True
    ) -> Int[np.ndarray, "_"]:
        """Returns the segments' values with the ids of the frame around each, or zeros in their
        places.
        """
        ends = np.cumsum(lengths)
        places = ((ends - lengths, self.ids.bos), (ends - 1, self.ids.eos))
        return interleave(
            int(lengths.sum()),
            [(at, mark if frame else 0) for at, mark in places if mark is not None],
            text,
        )

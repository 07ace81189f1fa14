"""Objectives of a model without an encoder of its own: causal, prefix, masked.

Causal: a framed document `[head] t₁ … tₙ [tail]` (`Tokenizer.frame`) gives the pairs (head → t₁),
(t₁ → t₂), …, (tₙ → tail). A piece is a run of such pairs, so every token of a document but its
first is a target exactly once, however the document was cut, and no position is spent on a token
without a successor. Positions begin at 0 in every piece.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int, Shaped

from research.data.batch import Batch
from research.data.chance import below, choose, fraction, ragged_arange
from research.data.corpus import Corpus
from research.data.objectives.base import Ids, Layout, Objective, Pieces, Runs, woven
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
    """Makes a causal batch from pieces of a token store.

    Args:
      tokens: the store; a piece of n pairs reads n + 1 of it.
      starts: where each piece begins in the store.
      lengths: pairs of each piece; the pieces of a row fill at most T.
      row_sizes: pieces of each row; the pieces come row by row.
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

    def documents(self, offsets: Int[np.ndarray, "_"]) -> Runs:
        """Returns the pairs of each framed document."""
        lengths = _pairs(offsets)
        return Runs(offsets[:-1], lengths, np.zeros_like(lengths))

    def widths(
        self, lengths: Int[np.ndarray, "P"], notes: Int[np.ndarray, "P"]
    ) -> Int[np.ndarray, "2 P"]:
        return np.stack([lengths, np.zeros_like(lengths)])

    def batch(self, pieces: Pieces) -> Batch:
        return causal_batch(
            pieces.tokens,
            pieces.starts,
            pieces.lengths,
            pieces.row_sizes,
            self.sequence_length,
            self.ids.pad,
        )


class Prefix(Causal):
    """The rest of a piece from its first p tokens, which see one another in both directions;
    `prefix` marks them.

    p is drawn from 1 … n for a piece of n pairs. A pair has weight where its target is not in the
    prefix.

    Source: Raffel et al. 2020, arXiv:1910.10683, section 3.2.1.
    """

    def batch(self, pieces: Pieces) -> Batch:
        lengths = pieces.lengths
        seen = 1 + below(pieces.draws(CHOICE, np.ones_like(lengths)), lengths)
        inside = np.repeat(seen, lengths) - ragged_arange(
            lengths
        )  # above 0: in the prefix; above 1: so is the target
        extra = Layout(lengths, pieces.row_sizes, self.sequence_length).arrays(
            prefix=((inside > 0).astype(np.int32), 0),
            weights=((inside <= 1).astype(np.float32), 0.0),
        )
        return super().batch(pieces) | {name: extra[name] for name in ("prefix", "weights")}


class Masked(Objective):
    """Hidden tokens of a piece from all others. Which are hidden is drawn anew in every epoch.

    Every piece is framed as a document is; the frame is never hidden. Random tokens are any of the
    vocabulary.

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1; Liu et al. 2019, arXiv:1907.11692,
    section 4.1. Here the number of hidden tokens is rounded in each piece, and at least one.
    """

    def __init__(self, config: MaskedConfig, ids: Ids, sequence_length: int):
        super().__init__(ids, sequence_length)
        self._config = config
        self._framing = int(ids.head is not None), int(ids.tail is not None)

    def widths(
        self, lengths: Int[np.ndarray, "P"], notes: Int[np.ndarray, "P"]
    ) -> Int[np.ndarray, "2 P"]:
        return np.stack([lengths + sum(self._framing), np.zeros_like(lengths)])

    def batch(self, pieces: Pieces) -> Batch:
        c = self._config
        text = pieces.tokens[pieces.places()].astype(np.int64)
        counts = np.maximum(np.rint(pieces.lengths * c.density).astype(np.int64), 1)
        hidden = choose(pieces.draws(CHOICE), pieces.lengths, counts)
        treatment = fraction(pieces.draws(TREATMENT)[hidden])
        replacement = below(pieces.draws(REPLACEMENT)[hidden], self.ids.vocab_size)
        shown = text.copy()
        shown[hidden] = np.where(
            treatment < c.mask,
            self.ids.mask,
            np.where(treatment < c.mask + c.random, replacement, text[hidden]),
        )
        lengths = self.widths(pieces.lengths, pieces.notes)[0]
        return Layout(lengths, pieces.row_sizes, self.sequence_length).arrays(
            tokens=(self._framed(shown, lengths), self.ids.pad),
            targets=(self._framed(text, lengths), self.ids.pad),
            weights=(self._framed(hidden, lengths, frame=False).astype(np.float32), 0.0),
        )

    def _framed(
        self, text: Shaped[np.ndarray, "_"], lengths: Int[np.ndarray, "P"], frame: bool = True
    ) -> Int[np.ndarray, "_"]:
        """Returns the pieces' values with the ids of the frame around each, or zeros in their
        places.
        """
        ends = np.cumsum(lengths)
        places = ((ends - lengths, self.ids.head), (ends - 1, self.ids.tail))
        return woven(
            int(lengths.sum()),
            [(at, mark if frame else 0) for at, mark in places if mark is not None],
            text,
        )

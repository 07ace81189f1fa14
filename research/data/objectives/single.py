"""Objectives of a model without an encoder of its own: causal, prefix, masked.

Causal: a framed document `[bos] t₁ … tₙ [eos]` (`Tokenizer.frame`) gives inputs with targets:
bos → t₁, t₁ → t₂, …, tₙ → eos. A segment is a run of these, so every token of a document but its
first is a target exactly once, however the document was cut, and no position is spent on a token
without a successor. A segment of n targets reads n + 1 tokens. Positions begin at 0 in every
segment.
"""

from collections.abc import Iterable

import numpy as np
from jaxtyping import Int, Shaped

from research.data.batch import Batch
from research.data.corpus import Corpus
from research.data.draws import below, choose, fraction
from research.data.objectives.base import Ids, Layout, Objective, Ranges, Segments, interleave
from research.data.objectives.config import MaskedConfig
from research.data.ragged import group_starts, ragged_arange, range_indices

# Purpose ids: hash64 salts.
CHOICE = 0
TREATMENT = 1
REPLACEMENT = 2


def bytes_per_target(corpora: Iterable[Corpus]) -> float:
    """Returns the UTF-8 bytes of text per predicted token: bits per byte = loss / ln 2 / this."""
    num_bytes = 0
    num_targets = 0
    for corpus in corpora:
        num_bytes += int(corpus.num_bytes.sum())
        num_targets += int(_num_targets(corpus.offsets).sum())
    return num_bytes / max(num_targets, 1)


def _num_targets(offsets: Int[np.ndarray, "_"]) -> Int[np.ndarray, "_"]:
    """Returns how many targets each framed document has: every token but its first is one."""
    return np.maximum(np.diff(offsets) - 1, 0)


def causal_batch(
    store: Shaped[np.ndarray, "_"],
    starts: Int[np.ndarray, "segments"],
    lengths: Int[np.ndarray, "segments"],
    row_sizes: Int[np.ndarray, "B"],
    sequence_length: int,
    pad_id: int,
) -> Batch:
    """Makes a causal batch from segments of a token store.

    Args:
      store: all tokens; a segment of n targets reads n + 1 tokens.
      starts: index of each segment's first token in the store.
      lengths: targets of each segment; the segments of a row fill at most T.
      row_sizes: segments of each row; the segments come row by row.
      sequence_length: T, the width of the rows.
      pad_id: the token that fills the rest of a row.
    """
    # starts [0, 7], lengths [3, 2] -> inputs [0, 1, 2, 7, 8], targets [1, 2, 3, 8, 9] of the store
    inputs = range_indices(starts, lengths)
    layout = Layout(lengths, row_sizes, sequence_length)
    return layout.arrays(
        tokens=(store[inputs], pad_id),
        targets=(store[inputs + 1], pad_id),
        weights=(np.ones(len(inputs), np.float32), 0.0),
    )


class Causal(Objective):
    """Causal language modeling: predicts each token from those before it."""

    def documents(self, offsets: Int[np.ndarray, "_"]) -> Ranges:
        """Returns where each framed document begins, and how many targets it has."""
        lengths = _num_targets(offsets)
        return Ranges(offsets[:-1], lengths, np.zeros_like(lengths))

    def widths(
        self, lengths: Int[np.ndarray, "segments"], width_args: Int[np.ndarray, "segments"]
    ) -> Int[np.ndarray, "2 segments"]:
        return np.stack([lengths, np.zeros_like(lengths)])

    def batch(self, segments: Segments) -> Batch:
        return causal_batch(
            segments.store,
            segments.starts,
            segments.lengths,
            segments.row_sizes,
            self.sequence_length,
            self.ids.pad,
        )


class Prefix(Causal):
    """Prefix LM: predicts the rest of a segment from its first p tokens, which attend to one
    another in both directions; `prefix` marks them.

    p is drawn from 1 … n for a segment of n targets. A target has weight where it is not in the
    prefix.

    Source: Raffel et al. 2020, arXiv:1910.10683, section 3.2.1.
    """

    def batch(self, segments: Segments) -> Batch:
        lengths = segments.lengths
        draws = segments.draws(CHOICE, np.ones_like(lengths))
        prefix_lengths = 1 + below(draws, lengths)

        # Targets of prefix tokens are prefix tokens too, except the target of the last one.
        # length 4, prefix length 2 -> prefix [1, 1, 0, 0], weights [0, 1, 1, 1]
        token_index = ragged_arange(lengths)
        prefix_length = np.repeat(prefix_lengths, lengths)
        in_prefix = token_index < prefix_length
        target_follows = token_index + 1 >= prefix_length

        layout = Layout(lengths, segments.row_sizes, self.sequence_length)
        arrays = layout.arrays(
            prefix=(in_prefix.astype(np.int32), 0), weights=(target_follows.astype(np.float32), 0.0)
        )
        batch = super().batch(segments)
        return batch | {"prefix": arrays["prefix"], "weights": arrays["weights"]}


class Masked(Objective):
    """Masked language modeling (BERT): predicts hidden tokens of a segment from all others. Which
    tokens are hidden is drawn anew in every epoch.

    Every segment is framed as a document is; BOS and EOS are never hidden. Random tokens are any of
    the vocabulary.

    Source: Devlin et al. 2019, arXiv:1810.04805, section 3.1; Liu et al. 2019, arXiv:1907.11692,
    section 4.1. Here the number of hidden tokens is rounded in each segment, and at least one.
    """

    def __init__(self, config: MaskedConfig, ids: Ids, sequence_length: int):
        super().__init__(ids, sequence_length)
        self._config = config
        self._frame_length = int(ids.bos is not None) + int(ids.eos is not None)

    def widths(
        self, lengths: Int[np.ndarray, "segments"], width_args: Int[np.ndarray, "segments"]
    ) -> Int[np.ndarray, "2 segments"]:
        return np.stack([lengths + self._frame_length, np.zeros_like(lengths)])

    def batch(self, segments: Segments) -> Batch:
        text = segments.tokens().astype(np.int64)
        hidden_counts = np.rint(segments.lengths * self._config.density)
        hidden_counts = np.maximum(hidden_counts.astype(np.int64), 1)
        is_hidden = choose(segments.draws(CHOICE), segments.lengths, hidden_counts)

        shown = text.copy()
        shown[is_hidden] = self._replacements(
            text[is_hidden],
            segments.draws(TREATMENT)[is_hidden],
            segments.draws(REPLACEMENT)[is_hidden],
        )

        widths, _ = self.widths(segments.lengths, segments.width_args)
        tokens = self._framed(shown, widths, self.ids.bos, self.ids.eos)
        targets = self._framed(text, widths, self.ids.bos, self.ids.eos)
        weights = self._framed(is_hidden, widths, bos=0, eos=0)
        layout = Layout(widths, segments.row_sizes, self.sequence_length)
        return layout.arrays(
            tokens=(tokens, self.ids.pad),
            targets=(targets, self.ids.pad),
            weights=(weights.astype(np.float32), 0.0),
        )

    def _replacements(
        self,
        hidden: Int[np.ndarray, "_"],
        treatments: Shaped[np.ndarray, "_"],
        replacements: Shaped[np.ndarray, "_"],
    ) -> Int[np.ndarray, "_"]:
        """Returns what is shown of hidden tokens: MASK, a random token, or the token itself."""
        mask_share = self._config.mask
        changed_share = mask_share + self._config.random
        treatment = fraction(treatments)
        random_tokens = below(replacements, self.ids.vocab_size)

        unmasked = np.where(treatment < changed_share, random_tokens, hidden)
        return np.where(treatment < mask_share, self.ids.mask, unmasked)

    def _framed(
        self,
        values: Shaped[np.ndarray, "_"],
        widths: Int[np.ndarray, "segments"],
        bos: int | None,
        eos: int | None,
    ) -> Int[np.ndarray, "_"]:
        """Returns the segments' values, each between `bos` and `eos` where documents have them."""
        # widths [4, 3] -> BOS at [0, 4], EOS at [3, 6]
        marks = []
        if self.ids.bos is not None:
            marks.append((group_starts(widths), bos))
        if self.ids.eos is not None:
            marks.append((np.cumsum(widths) - 1, eos))
        return interleave(int(widths.sum()), marks, values)

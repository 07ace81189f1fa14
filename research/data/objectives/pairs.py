"""The second text of a pair from the first: translation, summaries, answers."""

import numpy as np
from jaxtyping import Bool, Int

from research.data.batch import Batch
from research.data.objectives.base import Ids, Objective, Ranges, Segments, encoder_decoder_batch
from research.data.ragged import range_indices


class Translate(Objective):
    """Sequence-to-sequence: the encoder reads the first text of a pair (the source), the decoder
    predicts the second (the target); each ends with EOS.

    In the store a pair is two framed documents, one after the other. Its length counts the tokens
    of both, BOS and EOS included; its `width_args` is the length of the source, BOS and EOS
    included. A pair is never cut; one that is too long for a row is dropped.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.
    """

    atomic = True

    def __init__(self, ids: Ids, sequence_length: int, encoder_length: int):
        super().__init__(ids, sequence_length, encoder_length)
        self._bos_length = int(ids.bos is not None)

    def documents(self, offsets: Int[np.ndarray, "_"]) -> Ranges:
        """Returns the pairs of an even number of framed documents."""
        assert len(offsets) % 2, "half a pair"

        # Two pairs, offsets [0, 5, 8, 10, 14] -> starts [0, 8], lengths [8, 6], sources [5, 2]
        starts = offsets[:-1:2]
        lengths = np.diff(offsets[::2])
        source_lengths = np.diff(offsets)[::2]
        return Ranges(starts, lengths, source_lengths)

    def cut(self, documents: Ranges, seed: int) -> tuple[Ranges, Bool[np.ndarray, "segments"]]:
        """Returns the pairs that fit in a row; none is marked as filling one, so all are packed by
        best fit.
        """
        capacities = np.array([[self.sequence_length], [self.encoder_length]])
        widths = self.widths(documents.lengths, documents.width_args)
        fits = (widths <= capacities).all(axis=0)
        return documents[fits], np.zeros(fits.sum(), bool)

    def widths(
        self, lengths: Int[np.ndarray, "segments"], width_args: Int[np.ndarray, "segments"]
    ) -> Int[np.ndarray, "2 segments"]:
        source_lengths = width_args
        return np.stack([lengths - source_lengths, source_lengths]) - self._bos_length

    def batch(self, segments: Segments) -> Batch:
        target_lengths, source_lengths = self.widths(segments.lengths, segments.width_args)

        # Without its BOS a framed text is the text and EOS.
        source_starts = segments.starts + self._bos_length
        target_starts = source_starts + segments.width_args
        sources = segments.store[range_indices(source_starts, source_lengths)]
        targets = segments.store[range_indices(target_starts, target_lengths)]

        return encoder_decoder_batch(
            self,
            sources.astype(np.int64),
            source_lengths,
            targets.astype(np.int64),
            target_lengths,
            segments.row_sizes,
        )

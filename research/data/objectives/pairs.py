"""The second text of a pair from the first: translation, summaries, answers."""

import numpy as np
from jaxtyping import Bool, Int

from research.data.batch import Batch
from research.data.chance import ragged_arange
from research.data.objectives.base import Ids, Objective, Ranges, Segments, encoder_decoder_batch


class Translate(Objective):
    """The encoder reads the first text of a pair, the decoder gives the second; each ends with EOS.

    In the store a pair is two framed documents, one after the other. Its length counts the tokens
    of both, frames included, its variant those of the first. A pair is never cut; one that is too
    long for a row is left out.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.
    """

    atomic = True

    def __init__(self, ids: Ids, sequence_length: int, encoder_length: int):
        super().__init__(ids, sequence_length, encoder_length)
        self._bos_length = int(ids.bos is not None)

    def documents(self, offsets: Int[np.ndarray, "_"]) -> Ranges:
        """Returns the pairs of an even number of framed documents."""
        assert len(offsets) % 2, "half a pair"
        return Ranges(offsets[:-1:2], np.diff(offsets[::2]), np.diff(offsets)[::2])

    def cut(self, documents: Ranges, seed: int) -> tuple[Ranges, Bool[np.ndarray, "P"]]:
        """Returns the pairs that a row has room for; none of them fills it for sure."""
        rooms = np.array([[self.sequence_length], [self.encoder_length]])
        fits = (self.widths(documents.lengths, documents.variants) <= rooms).all(axis=0)
        return documents[fits], np.zeros(fits.sum(), bool)

    def widths(
        self, lengths: Int[np.ndarray, "P"], variants: Int[np.ndarray, "P"]
    ) -> Int[np.ndarray, "2 P"]:
        return np.stack([lengths - variants, variants]) - self._bos_length

    def batch(self, segments: Segments) -> Batch:
        given, read = self.widths(segments.lengths, segments.variants)
        # A framed text without its BOS is one that ends with EOS.
        sides = []
        for starts, lengths in (
            (segments.starts, read),
            (segments.starts + segments.variants, given),
        ):
            sides.append(
                segments.tokens[
                    np.repeat(starts + self._bos_length, lengths) + ragged_arange(lengths)
                ]
            )
        encoder, targets = (side.astype(np.int64) for side in sides)
        return encoder_decoder_batch(self, encoder, read, targets, given, segments.row_sizes)

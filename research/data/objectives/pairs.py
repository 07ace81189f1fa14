"""The second text of a pair from the first: translation, summaries, answers."""

import numpy as np
from jaxtyping import Bool, Int

from research.data.batch import Batch
from research.data.chance import ragged_arange
from research.data.objectives.base import Ids, Objective, Pieces, Runs, encoder_decoder_batch


class Translate(Objective):
    """The encoder reads the first text of a pair, the decoder gives the second; each ends with EOS.

    In the store a pair is two framed documents, one after the other. Its length counts the tokens
    of both, frames included, its note those of the first. A pair is never cut; one that is too long
    for a row is left out.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.
    """

    whole = True

    def __init__(self, ids: Ids, sequence_length: int, encoder_length: int):
        super().__init__(ids, sequence_length, encoder_length)
        self._head = int(ids.head is not None)

    def documents(self, offsets: Int[np.ndarray, "_"]) -> Runs:
        """Returns the pairs of an even number of framed documents."""
        assert len(offsets) % 2, "half a pair"
        return Runs(offsets[:-1:2], np.diff(offsets[::2]), np.diff(offsets)[::2])

    def cut(self, documents: Runs, seed: int) -> tuple[Runs, Bool[np.ndarray, "P"]]:
        """Returns the pairs that a row has room for; none of them fills it for sure."""
        rooms = np.array([[self.sequence_length], [self.encoder_length]])
        fits = (self.widths(documents.lengths, documents.notes) <= rooms).all(axis=0)
        return documents[fits], np.zeros(fits.sum(), bool)

    def widths(
        self, lengths: Int[np.ndarray, "P"], notes: Int[np.ndarray, "P"]
    ) -> Int[np.ndarray, "2 P"]:
        return np.stack([lengths - notes, notes]) - self._head

    def batch(self, pieces: Pieces) -> Batch:
        given, read = self.widths(pieces.lengths, pieces.notes)
        # A framed text without its head is one that ends with EOS.
        sides = []
        for starts, lengths in ((pieces.starts, read), (pieces.starts + pieces.notes, given)):
            sides.append(
                pieces.tokens[np.repeat(starts + self._head, lengths) + ragged_arange(lengths)]
            )
        encoder, targets = (side.astype(np.int64) for side in sides)
        return encoder_decoder_batch(self, encoder, read, targets, given, pieces.row_sizes)

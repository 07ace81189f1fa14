"""The base class of objectives, and the layout of segments in rows.

A segment is a run of one document's tokens that becomes one segment of a row (`Batch.segments`).
Arrays of segments are flat: the tokens of all segments one after the other, and the length of each.
"""

import abc
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt

from research.core.errors import UserError
from research.data.batch import Batch
from research.data.draws import fraction, hash64
from research.data.ragged import (
    exclusive_cumsum_in_groups,
    group_indices,
    group_starts,
    ragged_arange,
    range_indices,
)

# Some of a batch's arrays.
Arrays = dict[str, Shaped[np.ndarray, "B _"]]
# Names of these fields in the data digest of stored checkpoints: renaming them would reject old
# positions.
_STORED_NAMES = {"bos": "head", "eos": "tail", "decoder_start": "start", "sentence_end": "stop"}
# Purpose id: a hash64 salt, other than packing.ORDER.
VARIANT = 1


@dataclasses.dataclass(frozen=True)
class Ids:
    """The ids that an objective inserts, or needs to know.

    Attributes:
      pad: fills the rest of a row.
      vocab_size: V.
      bos, eos: the first and the last id of a framed document; None: there is none.
      decoder_start: what the decoder's input begins with.
      mask: replaces what is hidden.
      sentinels: replace the spans that are left out, first to last.
      sentence_end: what ends a sentence.
    """

    pad: int
    vocab_size: int
    bos: int | None
    eos: int | None
    decoder_start: int | None = None
    mask: int | None = None
    sentinels: tuple[int, ...] = ()
    sentence_end: int | None = None

    def stored(self) -> dict[str, Any]:
        """Returns the ids by the names that they have in the digests of checkpoints."""
        values = dataclasses.asdict(self)
        return {_STORED_NAMES.get(name, name): value for name, value in values.items()}


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Ranges of the token store: documents, or segments of them.

    Attributes:
      starts: index of each range's first token in the store.
      lengths: how long each is, in the objective's own unit: tokens of text; targets for `Causal`
        and `Prefix`; framed tokens of both texts of a pair for `Translate`.
      width_args: what `Objective.widths` needs of each beside its length: the index of its variant
        (for `Spans` that of the denoiser, else 0); for `Translate` the framed length of the source
        text.
    """

    starts: Int[np.ndarray, "ranges"]
    lengths: Int[np.ndarray, "ranges"]
    width_args: Int[np.ndarray, "ranges"]

    @classmethod
    def joined(cls, parts: Sequence["Ranges"]) -> "Ranges":
        """Returns the ranges of all parts in order; an empty list gives empty Ranges."""
        none = np.zeros(0, np.int64)
        return cls(
            np.concatenate([none, *(part.starts for part in parts)]),
            np.concatenate([none, *(part.lengths for part in parts)]),
            np.concatenate([none, *(part.width_args for part in parts)]),
        )

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Shaped[np.ndarray, "_"]) -> "Ranges":
        return Ranges(self.starts[index], self.lengths[index], self.width_args[index])


@dataclasses.dataclass(frozen=True)
class Segments:
    """The segments of a batch's rows, row by row.

    Attributes:
      store: the token store.
      starts, lengths, width_args: of each segment, as in `Ranges`.
      salts: the hash64 salt of every draw for a segment: another in every epoch.
      row_sizes: segments of each of the B rows.
    """

    store: Shaped[np.ndarray, "_"]
    starts: Int[np.ndarray, "segments"]
    lengths: Int[np.ndarray, "segments"]
    width_args: Int[np.ndarray, "segments"]
    salts: UInt[np.ndarray, "segments"]
    row_sizes: Int[np.ndarray, "B"]

    def tokens(self) -> Shaped[np.ndarray, "_"]:
        """Returns the tokens of all segments, one segment after the other."""
        return self.store[range_indices(self.starts, self.lengths)]

    def draws(
        self, purpose: int, lengths: Int[np.ndarray, "segments"] | None = None
    ) -> UInt[np.ndarray, "_"]:
        """Returns a draw for each token of the segments, or `lengths` of them for each segment;
        every purpose has its own.
        """
        lengths = self.lengths if lengths is None else lengths
        indices = range_indices(self.starts, lengths)
        return hash64(indices, np.repeat(self.salts, lengths), purpose)


class Objective(abc.ABC):
    """Makes batches of segments.

    The width of a segment in a row is known from its length and its `width_args`, before a batch
    draws anything. A variant is a way to make an example of a segment, as a denoiser of a mixture;
    most objectives have one. A framed document has the BOS and EOS that `Tokenizer.frame` adds.

    Attributes:
      sequence_length: T.
      encoder_length: M; 0 without an encoder.
      ids: what it inserts.
    """

    # How often each variant of a segment is drawn, relative to the others.
    variant_weights: tuple[float, ...] = (1.0,)
    # Whether a document may not be cut.
    atomic = False

    def __init__(self, ids: Ids, sequence_length: int, encoder_length: int = 0):
        self.ids = ids
        self.sequence_length = sequence_length
        self.encoder_length = encoder_length

    def documents(self, offsets: Int[np.ndarray, "_"]) -> Ranges:
        """Returns the text of each framed document.

        Args:
          offsets: where each begins in the store, then the store's size.
        """
        bos_length = int(self.ids.bos is not None)
        eos_length = int(self.ids.eos is not None)

        # Documents [bos a b c eos bos d eos], offsets [0, 5, 8] -> starts [1, 6], lengths [3, 1]
        starts = offsets[:-1] + bos_length
        lengths = np.maximum(np.diff(offsets) - bos_length - eos_length, 0)
        return Ranges(starts, lengths, np.zeros_like(lengths))

    def total_length(self, offsets: Int[np.ndarray, "_"]) -> int:
        """Returns the summed length of the documents, in the units of `Ranges.lengths`; 0: there is
        nothing to train on.

        Args:
          offsets: as of `documents`.
        """
        return int(self.documents(offsets).lengths.sum())

    def cut(self, documents: Ranges, seed: int) -> tuple[Ranges, Bool[np.ndarray, "segments"]]:
        """Returns the segments of documents, and which of them fill a row: all but the last of each
        do.

        Raises:
          UserError: rows too short for a segment of one token.
        """
        longest = self.longest_segments()

        # As many segments per document as the variant with the shortest segments needs; some will
        # be empty.
        # lengths [5, 2], longest [2, 4] -> most segments [3, 1] -> documents [0, 0, 0, 1]
        least = longest.min()
        most_segments = -(-documents.lengths // least)
        document = group_indices(most_segments)
        index_in_document = ragged_arange(most_segments)
        document_starts = documents.starts[document]

        # document start + index is unique per segment, as index < length: the hash key of its draw.
        variants = self._draw_variants(document_starts + index_in_document, seed)

        # A segment is as long as its variant can be, and begins where the one before it ends.
        # variants [0, 1, 0, 0] -> lengths [2, 4, 2, 2] -> offsets [0, 2, 6, 0], left [5, 3, -1, 2]
        lengths = longest[variants]
        offsets = exclusive_cumsum_in_groups(lengths, most_segments)
        left = documents.lengths[document] - offsets

        # The text's end cuts the last one short: lengths [2, 3, 2], of which [T, F, T] fill a row.
        starts = document_starts + offsets
        segments = Ranges(starts, np.minimum(lengths, left), variants)
        segments = segments[left > 0]
        fills_row = segments.lengths == longest[segments.width_args]
        return segments, fills_row

    def _draw_variants(
        self, keys: Int[np.ndarray, "segments"], seed: int
    ) -> Int[np.ndarray, "segments"]:
        """Draws a variant for each key, with probabilities in proportion to `variant_weights`."""
        if len(self.variant_weights) == 1:
            return np.zeros(len(keys), np.int64)

        # weights [1, 3] -> bounds [0.25]: a draw of 0.1 is variant 0, and one of 0.7 variant 1
        bounds = np.cumsum(self.variant_weights[:-1])
        bounds = bounds / sum(self.variant_weights)
        draws = fraction(hash64(keys, seed, VARIANT))
        return np.searchsorted(bounds, draws, side="right")

    def longest_segments(self) -> Int[np.ndarray, "variants"]:
        """Returns the length of the longest segment that a row has room for, for each variant.

        Raises:
          UserError: not even a segment of one token.
        """
        capacities = np.array([[self.sequence_length], [self.encoder_length]])
        # Each token of a segment takes room on one side at least, which bounds the length.
        lengths = np.arange(1, capacities.sum() + 1)

        longest = []
        for variant in range(len(self.variant_weights)):
            # Widths never fall as the length grows, so lengths that fit come first:
            # lengths [1, 2, 3, 4] fit [T, T, F, F] -> longest 2
            widths = self.widths(lengths, np.full(len(lengths), variant))
            fits = (widths <= capacities).all(axis=0)
            longest.append(fits.sum())
        if min(longest) == 0:
            raise self._too_short(longest.index(0))
        return np.array(longest)

    def _too_short(self, variant: int) -> UserError:
        """Returns the error of rows that have no room for a single token of this variant."""
        one_token = np.ones(1, np.int64)
        widths = self.widths(one_token, np.array([variant]))
        decoder_width, encoder_width = widths[:, 0]
        need = f"{decoder_width}"
        if encoder_width:
            need += f", and encoder_length = {self.encoder_length} at least {encoder_width}"
        return UserError(
            "sequence_length",
            self.sequence_length,
            f"must be at least {need}: that is what a single token takes.",
        )

    @abc.abstractmethod
    def widths(
        self, lengths: Int[np.ndarray, "segments"], width_args: Int[np.ndarray, "segments"]
    ) -> Int[np.ndarray, "2 segments"]:
        """Returns how many positions segments take in the decoder's (or the only) row and in the
        encoder's.

        Neither falls as the length grows.

        Args:
          lengths: of each segment, as in `Ranges`.
          width_args: of each segment, as in `Ranges`.
        """

    @abc.abstractmethod
    def batch(self, segments: Segments) -> Batch:
        """Returns the batch of the segments' rows."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the segments' tokens are in rows of one width: rows are filled from the left.

    Attributes:
      lengths: tokens of each segment.
      row_sizes: segments of each row.
      width: of the rows.
    """

    lengths: Int[np.ndarray, "segments"]
    row_sizes: Int[np.ndarray, "B"]
    width: int

    def arrays(self, side: str = "", **flat: tuple[Shaped[np.ndarray, "_"], int | float]) -> Arrays:
        """Returns `[B, width]` arrays of flat (values, fill), with `positions` and `segments`.

        Args:
          side: put before every name.
          flat: a value for each token, segment by segment, and what fills the rest; float32 where
              they are floating.
        """
        num_rows = len(self.row_sizes)

        # lengths [3, 2, 4], row sizes [2, 1] -> rows of segments [0, 0, 1]
        # -> tokens per row [5, 4]
        row = group_indices(self.row_sizes)
        filled = np.bincount(row, weights=self.lengths, minlength=num_rows)
        filled = filled.astype(np.int64)

        # Where each token goes in the flat [B · width]: width 8 -> [0, 1, 2, 3, 4, 8, 9, 10, 11]
        row_starts = np.arange(num_rows) * self.width
        destination = range_indices(row_starts, filled)

        # positions [0, 1, 2, 0, 1, 0, 1, 2, 3], segments [1, 1, 1, 2, 2, 1, 1, 1, 1]
        positions = ragged_arange(self.lengths)
        segment_numbers = ragged_arange(self.row_sizes) + 1
        segments = np.repeat(segment_numbers, self.lengths)

        batch = {}
        flat = {**flat, "positions": (positions, 0), "segments": (segments, 0)}
        for name, (values, fill) in flat.items():
            dtype = np.float32 if values.dtype.kind == "f" else np.int32
            array = np.full(num_rows * self.width, fill, dtype)
            array[destination] = values
            batch[side + name] = array.reshape(num_rows, self.width)
        return batch


def interleave(
    total: int,
    marks: list[tuple[Int[np.ndarray, "_"], Shaped[np.ndarray, "_"] | int]],
    rest: Shaped[np.ndarray, "_"],
) -> Int[np.ndarray, "_"]:
    """Returns `total` ids: marks, which are (indices, values), and between them the rest in its
    order.
    """
    # total 5, marks [([0, 3], 99)], rest [1, 2, 3] -> [99, 1, 2, 99, 3]
    out = np.empty(total, np.int64)
    is_rest = np.ones(total, bool)
    for indices, values in marks:
        out[indices] = values
        is_rest[indices] = False
    out[is_rest] = rest
    return out


def shift_right(
    targets: Int[np.ndarray, "_"], lengths: Int[np.ndarray, "segments"], start: int
) -> Int[np.ndarray, "_"]:
    """Returns the decoder's input for its targets: each segment one position later, after `start`.

    targets [5, 6, 7, 8], lengths [3, 1], start 0 -> [0, 5, 6, 0]
    """
    tokens = np.empty_like(targets)
    tokens[1:] = targets[:-1]
    tokens[group_starts(lengths)] = start
    return tokens


def encoder_decoder_batch(
    objective: Objective,
    encoder: Int[np.ndarray, "_"],
    encoder_lengths: Int[np.ndarray, "segments"],
    targets: Int[np.ndarray, "_"],
    target_lengths: Int[np.ndarray, "segments"],
    row_sizes: Int[np.ndarray, "B"],
) -> Batch:
    """Returns the batch of an encoder-decoder from the flat ids of both sides, segment by
    segment.
    """
    ids = objective.ids
    inputs = shift_right(targets, target_lengths, ids.decoder_start)
    weights = np.ones(len(targets), np.float32)
    decoder_layout = Layout(target_lengths, row_sizes, objective.sequence_length)
    decoder_arrays = decoder_layout.arrays(
        tokens=(inputs, ids.pad), targets=(targets, ids.pad), weights=(weights, 0.0)
    )

    encoder_layout = Layout(encoder_lengths, row_sizes, objective.encoder_length)
    encoder_arrays = encoder_layout.arrays("encoder_", tokens=(encoder, ids.pad))
    return decoder_arrays | encoder_arrays

"""What every objective is, and how its segments are laid out in rows."""

import abc
import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt

from research.core.errors import UserError
from research.data.batch import Batch
from research.data.chance import fraction, hash64, ragged_arange

# Some of a batch's arrays.
Arrays = dict[str, Shaped[np.ndarray, "B _"]]
# A checkpoint's position is valid for one order of the data, whose digest has these names.
_STORED_NAMES = {"bos": "head", "eos": "tail", "decoder_start": "start", "sentence_end": "stop"}


@dataclasses.dataclass(frozen=True)
class Ids:
    """The ids that an objective puts in, or needs to know.

    Attributes:
      pad: fills the rest of a row.
      vocab_size: V.
      bos, eos: what begins and ends a document in the store; None: nothing.
      decoder_start: what the decoder's input begins with.
      mask: stands for what is hidden.
      sentinels: stand for the spans that are left out, first to last.
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
        return {
            _STORED_NAMES.get(name, name): value for name, value in dataclasses.asdict(self).items()
        }


@dataclasses.dataclass(frozen=True)
class Ranges:
    """Ranges of the token store: documents, or segments of them.

    Attributes:
      starts: where each of the N runs begins.
      lengths: how long each is, in the objective's own measure.
      variants: what else the objective must know of each; its own affair.
    """

    starts: Int[np.ndarray, "N"]
    lengths: Int[np.ndarray, "N"]
    variants: Int[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Shaped[np.ndarray, "_"]) -> "Ranges":
        return Ranges(self.starts[index], self.lengths[index], self.variants[index])


@dataclasses.dataclass(frozen=True)
class Segments:
    """Segments of documents, row by row.

    Attributes:
      tokens: the store.
      starts: where each of the P segments begins in the store.
      lengths: how long each is, in the objective's own measure.
      variants: what the plan says of each segment beside its length; the objective's own affair.
      salts: what every draw for a segment is salted with: another in every epoch.
      row_sizes: segments of each of the B rows.
    """

    tokens: Shaped[np.ndarray, "_"]
    starts: Int[np.ndarray, "P"]
    lengths: Int[np.ndarray, "P"]
    variants: Int[np.ndarray, "P"]
    salts: UInt[np.ndarray, "P"]
    row_sizes: Int[np.ndarray, "B"]

    def token_indices(self) -> Int[np.ndarray, "_"]:
        """Returns where each token of the segments lies in the store."""
        return np.repeat(self.starts, self.lengths) + ragged_arange(self.lengths)

    def draws(
        self, purpose: int, lengths: Int[np.ndarray, "P"] | None = None
    ) -> UInt[np.ndarray, "_"]:
        """Returns a draw for each token of the segments, or for the first `lengths` of each; other
        purposes, others.
        """
        lengths = self.lengths if lengths is None else lengths
        return hash64(
            np.repeat(self.starts, lengths) + ragged_arange(lengths),
            np.repeat(self.salts, lengths),
            purpose,
        )


VARIANT = (
    1  # what the seed is hashed with for the variant of a segment; the plan's own draws have 0
)


class Objective(abc.ABC):
    """Makes batches of segments. The widths of a segment are known from its length and variant,
    before anything is drawn.

    Attributes:
      sequence_length: T.
      encoder_length: S; 0 without an encoder.
      ids: what it puts in.
    """

    # What segments may have variants, by number, and how often each is.
    variant_weights: tuple[float, ...] = (1.0,)
    # Whether a document may not be cut.
    atomic = False

    def __init__(self, ids: Ids, sequence_length: int, encoder_length: int = 0):
        self.ids, self.sequence_length, self.encoder_length = ids, sequence_length, encoder_length

    def documents(self, offsets: Int[np.ndarray, "_"]) -> Ranges:
        """Returns the text of each framed document.

        Args:
          offsets: where each begins in the store, then the store's size.
        """
        bos_length = int(self.ids.bos is not None)
        eos_length = int(self.ids.eos is not None)
        lengths = np.maximum(np.diff(offsets) - bos_length - eos_length, 0)
        return Ranges(offsets[:-1] + bos_length, lengths, np.zeros_like(lengths))

    def num_targets(self, offsets: Int[np.ndarray, "_"]) -> int:
        """Returns how much there is to learn from in framed documents, in the objective's own
        measure of length.

        Args:
          offsets: as of `documents`.
        """
        return int(self.documents(offsets).lengths.sum())

    def cut(self, documents: Ranges, seed: int) -> tuple[Ranges, Bool[np.ndarray, "P"]]:
        """Returns the segments of documents, and which of them fill a row: all but the last of each
        do.

        Raises:
          UserError: rows too short for a segment of one token.
        """
        longest = self.longest_segments()
        starts, lengths = documents.starts, documents.lengths
        most = -(-lengths // longest.min())
        number, document = ragged_arange(most), np.repeat(np.arange(len(lengths)), most)
        if len(self.variant_weights) == 1:
            variants = np.zeros(len(number), np.int64)
        else:
            draws = fraction(hash64(starts[document] + number, seed, VARIANT))
            variants = np.searchsorted(
                np.cumsum(self.variant_weights[:-1]) / sum(self.variant_weights),
                draws,
                side="right",
            )
        taken = longest[variants]
        begins = np.cumsum(taken) - taken
        begins = begins - np.repeat(begins[np.cumsum(most) - most], most)
        left = lengths[document] - begins
        segments = Ranges(starts[document] + begins, np.minimum(taken, left), variants)[left > 0]
        return segments, segments.lengths == longest[segments.variants]

    def longest_segments(self) -> Int[np.ndarray, "_"]:
        """Returns the length of the longest segment that a row has room for, for each variant.

        Raises:
          UserError: not even a segment of one token.
        """
        rooms = np.array([[self.sequence_length], [self.encoder_length]])
        lengths = np.arange(
            1, rooms.sum() + 1
        )  # a token of a segment is in one of the rows at least
        variants = [np.full(len(lengths), variant) for variant in range(len(self.variant_weights))]
        # Widths never fall, so those that fit come first.
        longest = np.array(
            [(self.widths(lengths, variant) <= rooms).all(axis=0).sum() for variant in variants]
        )
        if longest.min() == 0:
            wide, encoder = self.widths(np.ones(1, np.int64), np.array([longest.argmin()]))[:, 0]
            need = f"{wide}" + (
                f", and encoder_length = {self.encoder_length} at least {encoder}"
                if encoder
                else ""
            )
            raise UserError(
                "sequence_length",
                self.sequence_length,
                f"must be at least {need}: that is what a single token takes.",
            )
        return longest

    @abc.abstractmethod
    def widths(
        self, lengths: Int[np.ndarray, "P"], variants: Int[np.ndarray, "P"]
    ) -> Int[np.ndarray, "2 P"]:
        """Returns the places that segments take in the decoder (or the only) row and in the
        encoder's.

        Neither falls as the length grows.
        """

    @abc.abstractmethod
    def batch(self, segments: Segments) -> Batch:
        """Returns the batch of the segments' rows."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the segments' tokens lie in rows of one width: rows are filled from the left.

    Attributes:
      lengths: tokens of each segment.
      row_sizes: segments of each row.
      width: of the rows.
    """

    lengths: Int[np.ndarray, "P"]
    row_sizes: Int[np.ndarray, "B"]
    width: int

    def arrays(self, side: str = "", **flat: tuple[Shaped[np.ndarray, "_"], int | float]) -> Arrays:
        """Returns `[B, width]` arrays of flat (values, fill), with `positions` and `segments`.

        Args:
          side: put before every name.
          flat: a value for each token, segment by segment, and what fills the rest; float32 where
          they are floating.
        """
        rows = len(self.row_sizes)
        of_row = np.repeat(np.arange(rows), self.row_sizes)
        filled = np.bincount(of_row, weights=self.lengths, minlength=rows).astype(np.int64)
        # The k-th token of a row lies in its k-th place.
        place = np.arange(filled.sum()) + np.repeat(
            np.arange(rows) * self.width - (np.cumsum(filled) - filled), filled
        )
        segments = np.repeat(ragged_arange(self.row_sizes) + 1, self.lengths)
        flat = {**flat, "positions": (ragged_arange(self.lengths), 0), "segments": (segments, 0)}
        batch = {}
        for name, (values, fill) in flat.items():
            spread = np.full(
                rows * self.width, fill, np.float32 if values.dtype.kind == "f" else np.int32
            )
            spread[place] = values
            batch[side + name] = spread.reshape(rows, self.width)
        return batch


def interleave(
    total: int,
    marks: list[tuple[Int[np.ndarray, "_"], Shaped[np.ndarray, "_"] | int]],
    rest: Shaped[np.ndarray, "_"],
) -> Int[np.ndarray, "_"]:
    """Returns `total` ids: the marks at their places, and between them the rest in its order."""
    out, free = np.empty(total, np.int64), np.ones(total, bool)
    for places, values in marks:
        out[places], free[places] = values, False
    out[free] = rest
    return out


def shift_right(
    targets: Int[np.ndarray, "_"], lengths: Int[np.ndarray, "P"], start: int
) -> Int[np.ndarray, "_"]:
    """Returns the decoder's input for its targets: one on, each segment after its `start`."""
    tokens = np.empty_like(targets)
    tokens[1:] = targets[:-1]
    tokens[np.cumsum(lengths) - lengths] = start
    return tokens


def encoder_decoder_batch(
    objective: Objective,
    encoder: Int[np.ndarray, "_"],
    encoder_lengths: Int[np.ndarray, "P"],
    targets: Int[np.ndarray, "_"],
    target_lengths: Int[np.ndarray, "P"],
    row_sizes: Int[np.ndarray, "B"],
) -> Batch:
    """Returns the batch of an encoder-decoder from the flat ids of both sides,
    segment by segment.
    """
    ids = objective.ids
    tokens = shift_right(targets, target_lengths, ids.decoder_start)
    read = Layout(encoder_lengths, row_sizes, objective.encoder_length)
    given = Layout(target_lengths, row_sizes, objective.sequence_length)
    return given.arrays(
        tokens=(tokens, ids.pad),
        targets=(targets, ids.pad),
        weights=(np.ones(len(targets), np.float32), 0.0),
    ) | read.arrays("encoder_", tokens=(encoder, ids.pad))

"""What every objective is, and how its pieces are laid out in rows."""

import abc
import dataclasses

import numpy as np
from jaxtyping import Bool, Int, Shaped, UInt

from research.core.errors import UserError
from research.data.batch import Batch
from research.data.chance import fraction, hash64, ragged_arange

# Some of a batch's arrays.
Arrays = dict[str, Shaped[np.ndarray, "B _"]]


@dataclasses.dataclass(frozen=True)
class Ids:
    """The ids that an objective puts in, or needs to know.

    Attributes:
      pad: fills the rest of a row.
      vocab_size: V.
      head, tail: what frames a document in the store; None: nothing.
      start: what the decoder's input begins with.
      mask: stands for what is hidden.
      sentinels: stand for the spans that are left out, first to last.
      stop: what ends a sentence.
    """

    pad: int
    vocab_size: int
    head: int | None
    tail: int | None
    start: int | None = None
    mask: int | None = None
    sentinels: tuple[int, ...] = ()
    stop: int | None = None


@dataclasses.dataclass(frozen=True)
class Runs:
    """Runs of the token store: documents, or pieces of them.

    Attributes:
      starts: where each of the N runs begins.
      lengths: how long each is, in the objective's own measure.
      notes: what else the objective must know of each; its own affair.
    """

    starts: Int[np.ndarray, "N"]
    lengths: Int[np.ndarray, "N"]
    notes: Int[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: Shaped[np.ndarray, "_"]) -> "Runs":
        return Runs(self.starts[index], self.lengths[index], self.notes[index])


@dataclasses.dataclass(frozen=True)
class Pieces:
    """Pieces of documents, row by row.

    Attributes:
      tokens: the store.
      starts: where each of the P pieces begins in the store.
      lengths: how long each is, in the objective's own measure.
      notes: what the plan says of each piece beside its length; the objective's own affair.
      salts: what every draw for a piece is salted with: another in every epoch.
      row_sizes: pieces of each of the B rows.
    """

    tokens: Shaped[np.ndarray, "_"]
    starts: Int[np.ndarray, "P"]
    lengths: Int[np.ndarray, "P"]
    notes: Int[np.ndarray, "P"]
    salts: UInt[np.ndarray, "P"]
    row_sizes: Int[np.ndarray, "B"]

    def places(self) -> Int[np.ndarray, "_"]:
        """Returns where each token of the pieces lies in the store."""
        return np.repeat(self.starts, self.lengths) + ragged_arange(self.lengths)

    def draws(
        self, purpose: int, lengths: Int[np.ndarray, "P"] | None = None
    ) -> UInt[np.ndarray, "_"]:
        """Returns a draw for each token of the pieces, or for the first `lengths` of each; other
        purposes, others.
        """
        lengths = self.lengths if lengths is None else lengths
        return hash64(
            np.repeat(self.starts, lengths) + ragged_arange(lengths),
            np.repeat(self.salts, lengths),
            purpose,
        )


NOTE = 1  # what the seed is hashed with for the note of a piece; the plan's own draws have 0


class Objective(abc.ABC):
    """Makes batches of pieces. The widths of a piece are known from its length and note, before
    anything is drawn.

    Attributes:
      sequence_length: T.
      encoder_length: S; 0 without an encoder.
      ids: what it puts in.
    """

    # What pieces may have noted, by number, and how often each is.
    shares: tuple[float, ...] = (1.0,)
    # Whether a document may not be cut.
    whole = False

    def __init__(self, ids: Ids, sequence_length: int, encoder_length: int = 0):
        self.ids, self.sequence_length, self.encoder_length = ids, sequence_length, encoder_length

    def documents(self, offsets: Int[np.ndarray, "_"]) -> Runs:
        """Returns the text of each framed document.

        Args:
          offsets: where each begins in the store, then the store's size.
        """
        head, tail = int(self.ids.head is not None), int(self.ids.tail is not None)
        lengths = np.maximum(np.diff(offsets) - head - tail, 0)
        return Runs(offsets[:-1] + head, lengths, np.zeros_like(lengths))

    def num_targets(self, offsets: Int[np.ndarray, "_"]) -> int:
        """Returns how much there is to learn from in framed documents, in the objective's own
        measure of length.

        Args:
          offsets: as of `documents`.
        """
        return int(self.documents(offsets).lengths.sum())

    def cut(self, documents: Runs, seed: int) -> tuple[Runs, Bool[np.ndarray, "P"]]:
        """Returns the pieces of documents, and which of them fill a row: all but the last of each
        do.

        Raises:
          UserError: rows too short for a piece of one token.
        """
        longest = self.longest_pieces()
        starts, lengths = documents.starts, documents.lengths
        most = -(-lengths // longest.min())
        number, document = ragged_arange(most), np.repeat(np.arange(len(lengths)), most)
        if len(self.shares) == 1:
            notes = np.zeros(len(number), np.int64)
        else:
            draws = fraction(hash64(starts[document] + number, seed, NOTE))
            notes = np.searchsorted(
                np.cumsum(self.shares[:-1]) / sum(self.shares), draws, side="right"
            )
        taken = longest[notes]
        begins = np.cumsum(taken) - taken
        begins = begins - np.repeat(begins[np.cumsum(most) - most], most)
        left = lengths[document] - begins
        pieces = Runs(starts[document] + begins, np.minimum(taken, left), notes)[left > 0]
        return pieces, pieces.lengths == longest[pieces.notes]

    def longest_pieces(self) -> Int[np.ndarray, "_"]:
        """Returns the length of the longest piece that a row has room for, for each note.

        Raises:
          UserError: not even a piece of one token.
        """
        rooms = np.array([[self.sequence_length], [self.encoder_length]])
        lengths = np.arange(1, rooms.sum() + 1)  # a token of a piece is in one of the rows at least
        notes = [np.full(len(lengths), note) for note in range(len(self.shares))]
        # Widths never fall, so those that fit come first.
        longest = np.array(
            [(self.widths(lengths, note) <= rooms).all(axis=0).sum() for note in notes]
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
        self, lengths: Int[np.ndarray, "P"], notes: Int[np.ndarray, "P"]
    ) -> Int[np.ndarray, "2 P"]:
        """Returns the places that pieces take in the decoder (or the only) row and in the
        encoder's.

        Neither falls as the length grows.
        """

    @abc.abstractmethod
    def batch(self, pieces: Pieces) -> Batch:
        """Returns the batch of the pieces' rows."""


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the pieces' tokens lie in rows of one width: rows are filled from the left.

    Attributes:
      lengths: tokens of each piece.
      row_sizes: pieces of each row.
      width: of the rows.
    """

    lengths: Int[np.ndarray, "P"]
    row_sizes: Int[np.ndarray, "B"]
    width: int

    def arrays(self, side: str = "", **flat: tuple[Shaped[np.ndarray, "_"], int | float]) -> Arrays:
        """Returns `[B, width]` arrays of flat (values, fill), with `positions` and `segments`.

        Args:
          side: put before every name.
          flat: a value for each token, piece by piece, and what fills the rest; float32 where they
              are floating.
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


def woven(
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


def shifted(
    targets: Int[np.ndarray, "_"], lengths: Int[np.ndarray, "P"], start: int
) -> Int[np.ndarray, "_"]:
    """Returns the decoder's input for its targets: one on, each piece after its `start`."""
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
    """Returns the batch of an encoder-decoder from the flat ids of both sides, piece by piece."""
    ids = objective.ids
    tokens = shifted(targets, target_lengths, ids.start)
    read = Layout(encoder_lengths, row_sizes, objective.encoder_length)
    given = Layout(target_lengths, row_sizes, objective.sequence_length)
    return given.arrays(
        tokens=(tokens, ids.pad),
        targets=(targets, ids.pad),
        weights=(np.ones(len(targets), np.float32), 0.0),
    ) | read.arrays("encoder_", tokens=(encoder, ids.pad))

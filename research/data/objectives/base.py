"""What every objective is, and how its pieces are laid out in rows."""

import abc
import dataclasses

import numpy as np
from jaxtyping import Int, Shaped, UInt

from research.data.chance import hash64, ragged_arange

Batch = dict[str, Shaped[np.ndarray, "B _"]]


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

    def draws(self, purpose: int, lengths: Int[np.ndarray, "P"] | None = None) -> UInt[np.ndarray, "_"]:
        """Returns a draw for each token of the pieces, or for the first `lengths` of each; other purposes, others."""
        lengths = self.lengths if lengths is None else lengths
        return hash64(np.repeat(self.starts, lengths) + ragged_arange(lengths), np.repeat(self.salts, lengths), purpose)


class Objective(abc.ABC):
    """Makes batches of pieces. The widths of a piece are known from its length and note, before anything is drawn.

    Attributes:
      sequence_length: T.
      encoder_length: S; 0 without an encoder.
      ids: what it puts in.
    """

    # What decides the note of a piece: the share of each note, or one note for all.
    shares: tuple[float, ...] = (1.0,)

    def __init__(self, ids: Ids, sequence_length: int, encoder_length: int = 0):
        self.ids, self.sequence_length, self.encoder_length = ids, sequence_length, encoder_length

    def contents(self, offsets: Int[np.ndarray, "_"]) -> tuple[Int[np.ndarray, "D"], Int[np.ndarray, "D"]]:
        """Returns where the text of each framed document begins in the store, and its tokens."""
        head, tail = int(self.ids.head is not None), int(self.ids.tail is not None)
        return offsets[:-1] + head, np.maximum(np.diff(offsets) - head - tail, 0)

    @abc.abstractmethod
    def widths(self, lengths: Int[np.ndarray, "P"], notes: Int[np.ndarray, "P"]) -> Int[np.ndarray, "2 P"]:
        """Returns the places that pieces take in the decoder (or the only) row and in the encoder's.

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

    def arrays(self, side: str = "", **flat: tuple[Shaped[np.ndarray, "_"], int | float]) -> Batch:
        """Returns `[B, width]` arrays of flat (values, fill), with `positions` and `segments`.

        Args:
          side: put before every name.
          flat: a value for each token, piece by piece, and what fills the rest; float32 where they are floating.
        """
        rows = len(self.row_sizes)
        of_row = np.repeat(np.arange(rows), self.row_sizes)
        filled = np.bincount(of_row, weights=self.lengths, minlength=rows).astype(np.int64)
        # The k-th token of a row lies in its k-th place.
        place = np.arange(filled.sum()) + np.repeat(np.arange(rows) * self.width - (np.cumsum(filled) - filled), filled)
        segments = np.repeat(ragged_arange(self.row_sizes) + 1, self.lengths)
        flat = {**flat, "positions": (ragged_arange(self.lengths), 0), "segments": (segments, 0)}
        batch = {}
        for name, (values, fill) in flat.items():
            spread = np.full(rows * self.width, fill, np.float32 if values.dtype.kind == "f" else np.int32)
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


def shifted(targets: Int[np.ndarray, "_"], lengths: Int[np.ndarray, "P"], start: int) -> Int[np.ndarray, "_"]:
    """Returns the decoder's input for its targets: one on, each piece after its `start`."""
    tokens = np.empty_like(targets)
    tokens[1:] = targets[:-1]
    tokens[np.cumsum(lengths) - lengths] = start
    return tokens

"""Best-fit packing: which segments of which documents share a row, planned from lengths alone.

The documents are put in an order that the seed fixes, and packed block by block, so memory for
planning is bounded and row i is a pure function of (seed, objective, i). Inside a block a document
is cut into the longest segments that fill a row, and what is left is packed by best-fit decreasing:
longest first, each into the fullest row that still has room. A row of an encoder-decoder has two
rooms, and a segment needs its place in both.

Source: Ding et al. 2024, arXiv:2404.10830, section 3 (there over the whole corpus; here over
    blocks).
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from research.core.errors import UserError
from research.data.batch import Batch
from research.data.chance import hash64, ragged_arange
from research.data.corpus import Corpus
from research.data.objectives import Objective, Ranges, Segments
from research.data.source_files import stable_hash

PADDING_ROW = -1
ORDER = 0  # what the seed is hashed with for the order of the documents


@dataclasses.dataclass(frozen=True)
class Plan:
    """Segments row by row: row i holds the segments `row_starts[i]:row_starts[i + 1]`.

    Attributes:
      starts: where each of the P segments begins in the token store.
      lengths: length of each segment, in the objective's measure.
      variants: what else the objective must know of each segment.
      row_starts: first segment of each of the R rows, then P.
      padding: share of all positions that hold no token.
      dropped: documents that may not be cut, and are too long for a row.
    """

    starts: Int[np.ndarray, "P"]
    lengths: Int[np.ndarray, "P"]
    variants: Int[np.ndarray, "P"]
    row_starts: Int[np.ndarray, "_"]
    padding: float
    dropped: int

    @property
    def num_rows(self) -> int:
        """Number of rows in an epoch, R."""
        return len(self.row_starts) - 1


def plan_rows(
    offsets: Int[np.ndarray, "_"], objective: Objective, *, seed: int, block_documents: int
) -> Plan:
    """Plans the rows of one epoch.

    Args:
      offsets: where each document begins in the token store, then its size.
      objective: says what the segments of a document are, and how much room they take.
      seed: fixes the order of the documents and of the rows.
      block_documents: documents that are packed together; more of them leave less padding.

    Raises:
      UserError: rows too short for a segment of one token.
    """
    documents = objective.documents(offsets)
    order = np.argsort(hash64(np.arange(len(documents)), seed, ORDER), kind="stable")
    order = order[documents.lengths[order] > 0]
    blocks = [
        order[first : first + block_documents] for first in range(0, len(order), block_documents)
    ]
    plans = [_pack_block(documents[block], objective, seed) for block in blocks]
    none = np.zeros(0, np.int64)
    *segments, row_sizes = [
        np.concatenate([none, *parts]) for parts in zip(*plans, strict=True)
    ] or [none] * 4
    places = len(row_sizes) * (objective.sequence_length + objective.encoder_length)
    padding = 1.0 - int(objective.widths(*segments[1:]).sum()) / max(places, 1)
    dropped = len(order) - len(segments[0]) if objective.atomic else 0
    return Plan(*segments, np.concatenate([[0], np.cumsum(row_sizes)]), padding, dropped)


def _pack_block(
    documents: Ranges, objective: Objective, seed: int
) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"], Int[np.ndarray, "P"], Int[np.ndarray, "R"]]:
    """Returns starts, lengths, variants and segments a row of one block: the full rows first, then
    the packed rests.
    """
    segments, full = objective.cut(documents, seed)
    full_segments, rest = np.flatnonzero(full), np.flatnonzero(~full)
    rooms = np.array([objective.sequence_length, objective.encoder_length])
    widths = objective.widths(segments.lengths[rest], segments.variants[rest])
    tight = int(
        np.argmax(widths.sum(axis=1) / np.maximum(rooms, 1))
    )  # the room that runs out first
    longest_first = np.argsort(-widths[tight], kind="stable")
    rest, widths = rest[longest_first], widths[:, longest_first].tolist()
    row = best_fit(widths[tight], int(rooms[tight]), widths[1 - tight], int(rooms[1 - tight]))
    order = np.concatenate([full_segments, rest[np.argsort(row, kind="stable")]])
    segments, row_sizes = (
        segments[order],
        np.concatenate([np.ones_like(full_segments), np.bincount(row)]),
    )
    return segments.starts, segments.lengths, segments.variants, row_sizes


def best_fit(
    lengths: list[int], capacity: int, others: list[int], other_capacity: int
) -> Int[np.ndarray, "P"]:
    """Returns the bin of each segment: the fullest open one that has room, else a new one.

    Bit c of `room` says that some bin has c places left, so the tightest bin for n is the lowest
    set bit from n on. Of the bins with equally many places left the newest is asked whether its
    other room suffices, too.

    Args:
      lengths: in [1, capacity], in the order in which they are placed (longest first for best-fit
          decreasing).
      capacity: size of every bin.
      others: what each segment takes of a bin's other room, in [0, other_capacity].
      other_capacity: size of that.
    """
    bins = np.empty(len(lengths), np.int64)
    room, with_room = 0, [[] for _ in range(capacity + 1)]
    other_room: list[int] = []
    for i, (n, other) in enumerate(zip(lengths, others, strict=True)):
        fits = room >> n << n
        while fits:
            left = (fits & -fits).bit_length() - 1
            if other_room[with_room[left][-1]] >= other:
                break
            fits &= fits - 1
        if fits:
            chosen = with_room[left].pop()
            if not with_room[left]:
                room ^= 1 << left
        else:
            left, chosen = capacity, len(other_room)
            other_room.append(other_capacity)
        bins[i] = chosen
        other_room[chosen] -= other
        if left > n:
            with_room[left - n].append(chosen)
            room |= 1 << (left - n)
    return bins


class PackedRows:
    """The packed rows of a corpus; a batch of them is made from the token store when it is asked
    for.
    """

    def __init__(self, corpus: Corpus, *, objective: Objective, seed: int, block_documents: int):
        """Args: as `plan_rows`.

        Raises:
          UserError: a corpus without a single segment, or rows that are too short.
        """
        self.corpus, self._objective = corpus, objective
        self.plan = plan_rows(
            np.asarray(corpus.offsets), objective, seed=seed, block_documents=block_documents
        )
        if self.plan.num_rows == 0:
            long = (
                f": its {self.plan.dropped} pairs are all too long for a row"
                if self.plan.dropped
                else ""
            )
            raise UserError(f"{corpus.folder} holds no text to learn from{long}.")
        self._seed = stable_hash(
            f"{seed}/{corpus.digest}"
        )  # the same places of two corpora draw differently

    def __len__(self) -> int:
        return self.plan.num_rows

    def batch(self, rows: Int[np.ndarray, "B"], epochs: Int[np.ndarray, "B"]) -> Batch:
        """Returns the batch of these rows, in this order, as they are drawn in these epochs.

        `PADDING_ROW` gives a row without a token.
        """
        first = self.plan.row_starts[rows]
        sizes = np.where(rows == PADDING_ROW, 0, self.plan.row_starts[rows + 1] - first)
        numbers = np.repeat(first, sizes) + ragged_arange(sizes)
        # A causal segment of n pairs reads n + 1 tokens; the last one of a store may end with it.
        starts = self.plan.starts[numbers]
        self.corpus.verify(
            starts, np.minimum(self.plan.lengths[numbers] + 1, len(self.corpus.tokens) - starts)
        )
        segments = Segments(
            self.corpus.tokens,
            starts,
            self.plan.lengths[numbers],
            self.plan.variants[numbers],
            np.repeat(hash64(epochs, self._seed), sizes),
            sizes,
        )
        return self._objective.batch(segments)

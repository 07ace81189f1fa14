"""Best-fit packing: which segments of which documents share a row, planned from lengths alone.

The documents are put in an order that the seed fixes, and packed block by block, so the planner
needs bounded memory. Inside a block a document is cut into the longest segments that fill a row,
and the rest is packed by best-fit decreasing: longest first, each into the fullest row that still
has room. A row of an encoder-decoder has two sides, the decoder's and the encoder's, and a segment
must fit into both.

The segments of a planned row are the same in every epoch: they depend on the corpus, the objective,
the seed and `block_documents` alone. What the objective draws for them depends on the epoch, too.
As the index in a stream of rows fixes the epoch, the row at global index i, random draws included,
depends on the data, the config, the seed and i alone.

Source: Ding et al. 2024, arXiv:2404.10830, section 3 (there over the whole corpus; here over
    blocks).
"""

import dataclasses

import numpy as np
from jaxtyping import Int

from research.core.errors import UserError
from research.data.batch import Batch
from research.data.corpus import Corpus
from research.data.draws import hash64
from research.data.objectives import Objective, Ranges, Segments
from research.data.ragged import range_indices
from research.data.source_files import stable_hash

# Stands for a row without a token.
PADDING_ROW = -1
# Purpose id: a hash64 salt.
ORDER = 0


@dataclasses.dataclass(frozen=True)
class Plan:
    """The rows of one epoch: row i holds the segments `row_starts[i]:row_starts[i + 1]`.

    Attributes:
      segments: where each segment is in the token store, row by row.
      row_starts: first segment of each row, then the number of segments.
      padding: share of all positions that hold no token.
      dropped: documents that may not be cut, and are too long for a row.
    """

    segments: Ranges
    row_starts: Int[np.ndarray, "_"]
    padding: float
    dropped: int

    @property
    def num_rows(self) -> int:
        """Number of rows in an epoch."""
        return len(self.row_starts) - 1


def plan_rows(
    offsets: Int[np.ndarray, "_"], objective: Objective, *, seed: int, block_documents: int
) -> Plan:
    """Plans the rows of one epoch.

    Args:
      offsets: where each document begins in the token store, then its size.
      objective: cuts documents into segments, and knows how much of a row each takes.
      seed: of the document order, and of each segment's variant.
      block_documents: documents that are packed together; more of them leave less padding.

    Raises:
      UserError: rows too short for a segment of one token.
    """
    documents = objective.documents(offsets)
    order = _document_order(documents.lengths, seed)

    # Order [4, 0, 2, 1, 3] in blocks of 2 -> [4, 0], [2, 1], [3]
    segments = []
    row_sizes = [np.zeros(1, np.int64)]
    for first in range(0, len(order), block_documents):
        block = order[first : first + block_documents]
        block_segments, block_row_sizes = _pack_block(documents[block], objective, seed)
        segments.append(block_segments)
        row_sizes.append(block_row_sizes)
    segments = Ranges.joined(segments)

    # Segments of each row, after a 0: [0, 2, 1, 3] -> starts [0, 2, 3, 6]
    row_starts = np.cumsum(np.concatenate(row_sizes))
    padding = _padding(segments, len(row_starts) - 1, objective)

    # A document that may not be cut is one segment, or none.
    dropped = len(order) - len(segments) if objective.atomic else 0
    return Plan(segments, row_starts, padding, dropped)


def _document_order(lengths: Int[np.ndarray, "documents"], seed: int) -> Int[np.ndarray, "_"]:
    """Returns the indices of the documents that hold text, in the random order of a seed."""
    draws = hash64(np.arange(len(lengths)), seed, ORDER)
    order = np.argsort(draws, kind="stable")
    has_text = lengths[order] > 0
    return order[has_text]


def _padding(segments: Ranges, num_rows: int, objective: Objective) -> float:
    """Returns the share of positions, on both sides of the rows, that no segment fills."""
    widths = objective.widths(segments.lengths, segments.width_args)
    row_width = objective.sequence_length + objective.encoder_length
    positions = num_rows * row_width
    return 1.0 - int(widths.sum()) / max(positions, 1)


def _pack_block(
    documents: Ranges, objective: Objective, seed: int
) -> tuple[Ranges, Int[np.ndarray, "rows"]]:
    """Returns the segments of a block of documents, row by row, and how many each row holds.

    The rows that one segment fills come first, then those that best fit makes of the rest.
    """
    segments, fills_row = objective.cut(documents, seed)
    full = np.flatnonzero(fills_row)
    rest = np.flatnonzero(~fills_row)

    # What each segment takes of the decoder's and of the encoder's side of a row: [2, segments].
    capacities = np.array([objective.sequence_length, objective.encoder_length])
    widths = objective.widths(segments.lengths[rest], segments.width_args[rest])

    # The side that runs out first decides which row is tightest; the other must suffice, too.
    # widths [[3, 4], [9, 9]], capacities [8, 10] -> in use [7/8, 18/10] -> main side 1
    in_use = widths.sum(axis=1) / np.maximum(capacities, 1)
    main = int(np.argmax(in_use))
    other = 1 - main

    longest_first = np.argsort(-widths[main], kind="stable")
    rest = rest[longest_first]
    widths = widths[:, longest_first]
    row = best_fit(
        widths[main].tolist(), int(capacities[main]), widths[other].tolist(), int(capacities[other])
    )

    # Segments [a, b, c] in rows [0, 1, 0] -> row by row [a, c, b], row sizes [2, 1]
    rest_by_row = rest[np.argsort(row, kind="stable")]
    order = np.concatenate([full, rest_by_row])
    row_sizes = np.concatenate([np.ones_like(full), np.bincount(row)])
    return segments[order], row_sizes


def best_fit(
    lengths: list[int], capacity: int, other_lengths: list[int], other_capacity: int
) -> Int[np.ndarray, "segments"]:
    """Returns the bin of each segment: the fullest open one that has room, else a new one.

    Of bins with equal room only the one filled last is tried.

    Args:
      lengths: in [1, capacity], in the order in which they are packed (longest first for best-fit
          decreasing).
      capacity: size of every bin.
      other_lengths: what each segment takes of a bin's other side, in [0, other_capacity].
      other_capacity: size of that side.
    """
    # Bit r of `room_bits` is set where a bin has room for r more tokens; `bins_by_room[r]` lists
    # these bins. Bins with room for 2, 5 and 5:
    # room_bits 0b100100, bins_by_room[2] [0], bins_by_room[5] [1, 2]
    room_bits = 0
    bins_by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    other_room_by_bin: list[int] = []
    bins = np.empty(len(lengths), np.int64)

    for i, (length, other_length) in enumerate(zip(lengths, other_lengths, strict=True)):
        # The tightest bin is the lowest set bit from `length` on.
        # length 3, room_bits 0b100100 -> fitting_bits 0b100000 -> room 5
        fitting_bits = room_bits >> length << length
        while fitting_bits:
            room = (fitting_bits & -fitting_bits).bit_length() - 1
            candidate = bins_by_room[room][-1]
            if other_room_by_bin[candidate] >= other_length:
                break
            fitting_bits &= fitting_bits - 1  # clears the lowest bit

        if fitting_bits:
            chosen = bins_by_room[room].pop()
            if not bins_by_room[room]:
                room_bits ^= 1 << room
        else:
            chosen = len(other_room_by_bin)
            other_room_by_bin.append(other_capacity)
            room = capacity

        bins[i] = chosen
        other_room_by_bin[chosen] -= other_length
        room -= length
        if room > 0:
            bins_by_room[room].append(chosen)
            room_bits |= 1 << room
    return bins


class PackedRows:
    """The packed rows of a corpus; a batch of them is made from the token store on demand."""

    def __init__(self, corpus: Corpus, *, objective: Objective, seed: int, block_documents: int):
        """Args: as `plan_rows`.

        Raises:
          UserError: a corpus without a single segment, or rows that are too short.
        """
        self.corpus = corpus
        self._objective = objective
        self.plan = plan_rows(
            np.asarray(corpus.offsets), objective, seed=seed, block_documents=block_documents
        )
        if self.plan.num_rows == 0:
            reason = ""
            if self.plan.dropped:
                reason = f": its {self.plan.dropped} pairs are all too long for a row"
            raise UserError(f"{corpus.folder} holds no text to learn from{reason}.")

        # The same offsets in two corpora draw differently.
        self._draw_seed = stable_hash(f"{seed}/{corpus.digest}")

    def __len__(self) -> int:
        return self.plan.num_rows

    def batch(self, rows: Int[np.ndarray, "B"], epochs: Int[np.ndarray, "B"]) -> Batch:
        """Returns the batch of these rows, in this order, as they are drawn in these epochs.

        `PADDING_ROW` gives a row without a token.
        """
        # rows [4, 7], whose segments are 9:11 and 15:16 -> row sizes [2, 1], segments [9, 10, 15]
        # PADDING_ROW wraps around to a negative count, which is replaced by 0.
        first = self.plan.row_starts[rows]
        num_segments = self.plan.row_starts[rows + 1] - first
        row_sizes = np.where(rows == PADDING_ROW, 0, num_segments)
        ranges = self.plan.segments[range_indices(first, row_sizes)]

        # One token more, for the last target of a causal segment: a segment of n targets reads
        # n + 1 tokens. Other objectives may have a segment that ends with the store, so this is
        # clamped.
        up_to_end = len(self.corpus.tokens) - ranges.starts
        self.corpus.verify(ranges.starts, np.minimum(ranges.lengths + 1, up_to_end))

        salts = hash64(epochs, self._draw_seed)
        segments = Segments(
            store=self.corpus.tokens,
            starts=ranges.starts,
            lengths=ranges.lengths,
            width_args=ranges.width_args,
            salts=np.repeat(salts, row_sizes),
            row_sizes=row_sizes,
        )
        return self._objective.batch(segments)

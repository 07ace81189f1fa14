"""Batches of packed rows: the row at global index i, random draws included, depends on the data,
the config, the seed and i alone.

Row i of the stream goes to batch i // B. Of that batch, part p of P holds the rows p·B/P to
(p+1)·B/P, so the number of hosts, of workers and the shape of the mesh change which process makes a
row and never which row it is.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from research.core.errors import UserError
from research.core.progress import track
from research.data.batch import Batch
from research.data.corpus import Corpus
from research.data.mixing import row_stream
from research.data.objectives import Objective, build, identity
from research.data.packing import PADDING_ROW, PackedRows
from research.data.prepare import DataConfig
from research.data.tokenizers import Tokenizer

# Held-out rows are packed and ordered in the same way for every seed, so that runs can be compared.
HELDOUT_SEED = 0
# Rows of an endless stream: Grain counts batches in floating point, which the length of its own
# endless datasets overflows.
ENDLESS = 2**50


class Loader:
    """An endless iterator over one part of every batch.

    Attributes:
      position: global index of the next row; all that a checkpoint needs, with the digest that
        `state` adds as a check.
    """

    def __init__(
        self,
        corpora: Sequence[Corpus],
        config: DataConfig,
        tokenizer: Tokenizer,
        *,
        batch_size: int,
        sequence_length: int,
        seed: int,
        part_index: int = 0,
        part_count: int = 1,
        start: int = 0,
    ):
        """Plans the rows; reading begins with the first `next`.

        Args:
          corpora: one for each of `config.sources`; those without text are left out of the mixture.
          config: weights, objective, packing blocks, workers.
          tokenizer: what made the corpora; some objectives insert its control tokens.
          batch_size: rows of a batch over all processes, B.
          sequence_length: T.
          seed: of the packing, the shuffle, and what the objective draws.
          part_index: p, in [0, P); processes whose devices lie in one part of the batch read the
              same one.
          part_count: P, a divisor of B.
          start: global index of the first row.

        Raises:
          UserError: a batch that does not divide, rows that are too short, no text at all, or a
            tokenizer without what the objective needs.
        """
        _check_sizes(batch_size, sequence_length, part_count)
        objective = build(config.objective, tokenizer, sequence_length)
        kept = [
            (corpus, source.weight)
            for corpus, source in zip(corpora, config.sources, strict=True)
            if objective.total_length(corpus.offsets) > 0
        ]
        if not kept:
            raise UserError("sources", constraint="hold no text to train on.")
        corpora = [corpus for corpus, _ in kept]
        weights = [weight for _, weight in kept]

        self._rows = _packed(corpora, config, objective, seed)
        num_rows = [len(rows) for rows in self._rows]
        self._stream = row_stream(num_rows, weights, seed)
        self._config = config
        self._batch_size = batch_size
        self._part_index = part_index
        self._part_count = part_count

        # Everything that decides the order and the content of the rows.
        digests = [(corpus.digest, weight) for corpus, weight in kept]
        order = [seed, sequence_length, config.block_documents, digests]
        order += identity(config.objective, objective)
        self._order = hashlib.sha256(json.dumps(order).encode()).hexdigest()
        self._iterator: grain.DatasetIterator | None = None
        self.position = start

    @property
    def rows_per_epoch(self) -> int:
        """Rows of all sources together."""
        return sum(len(rows) for rows in self._rows)

    @property
    def padding(self) -> float:
        """Share of positions without a token, over one epoch of all sources."""
        empty = sum(rows.plan.padding * len(rows) for rows in self._rows)
        return empty / self.rows_per_epoch

    @property
    def dropped(self) -> int:
        """Pairs of all sources that are too long for a row."""
        return sum(rows.plan.dropped for rows in self._rows)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next()

    def next(self, state: Any = None) -> Batch:
        """Returns the next batch; `state` is that of the training, and is not read."""
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        if self._config.workers:
            # A copy: the memory shared with the workers is freed when nothing refers to it.
            batch = {name: np.array(values) for name, values in batch.items()}
        self.position += self._batch_size
        return batch

    def _start(self) -> grain.DatasetIterator:
        """Returns an iterator over this part of the batches from `position` on."""
        config = self._config
        part_size = self._batch_size // self._part_count
        stream = self._stream[self.position : self.position + ENDLESS]

        # Batches of a part's size: of 2 parts, part 0 has the batches 0, 2, 4, … of them.
        parts = stream.batch(part_size, batch_fn=_Gather(self._rows))
        own_parts = parts[self._part_index :: self._part_count]

        threads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=config.prefetch)
        dataset = own_parts.to_iter_dataset(threads)
        if config.workers:
            # Grain reads its own flags, and not every program is an absl app.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            processes = grain.MultiprocessingOptions(
                config.workers, per_worker_buffer_size=config.prefetch
            )
            dataset = dataset.mp_prefetch(processes)
        return iter(dataset)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, as JSON holds it: the position, and a digest of what
        decides the order.
        """
        return {"position": self.position, "order": self._order}

    def restore(self, state: dict[str, Any]) -> None:
        """Resumes from a saved state; batch size, processes and workers may have changed since.

        Raises:
          UserError: the state belongs to other data, another objective, seed or sequence length.
        """
        if state["order"] != self._order:
            raise UserError(
                "data",
                constraint=": the checkpoint was made with other data, weights, objective, "
                "packing, seed or"
                " sequence_length; its position in the samples means nothing here.",
            )
        self.close()
        self.position = state["position"]

    def close(self) -> None:
        """Ends threads and workers; the next `next` starts them again."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


def heldout_batches(
    corpora: Sequence[Corpus],
    config: DataConfig,
    tokenizer: Tokenizer,
    *,
    batch_size: int,
    sequence_length: int,
    part_index: int = 0,
    part_count: int = 1,
    max_batches: int | None = None,
) -> Iterator[Batch]:
    """Yields every held-out row exactly once, in an order that is the same for all runs; the last
    batch is filled with padding.

    The order is shuffled, so the first `max_batches` are a random sample of all.

    Args:
      corpora: the held-out corpora; empty ones are skipped.
      config: objective, packing blocks.
      tokenizer: as in `Loader`.
      batch_size: rows of a batch over all processes.
      sequence_length: T.
      part_index: which part of each batch; as in `Loader`.
      part_count: number of parts; a divisor of `batch_size`.
      max_batches: the most batches; None: all.

    Raises:
      UserError: a batch that does not divide, or nothing held out.
    """
    _check_sizes(batch_size, sequence_length, part_count)
    objective = build(config.objective, tokenizer, sequence_length)
    corpora = [corpus for corpus in corpora if objective.total_length(corpus.offsets) > 0]
    rows = _packed(corpora, config, objective, HELDOUT_SEED)
    if not rows:
        raise UserError(
            "sources", constraint=": no document is held out; raise heldout_fraction or add text."
        )

    # (source, row, epoch) of all rows, shuffled.
    triples = []
    for source, packed in enumerate(rows):
        triples += [(source, row, 0) for row in range(len(packed))]
    stream = grain.MapDataset.source(triples).shuffle(seed=HELDOUT_SEED)
    gather = _Gather(rows)

    part_size = batch_size // part_count
    num_batches = -(-len(triples) // batch_size)
    if max_batches is not None:
        num_batches = min(num_batches, max_batches)
    for index in track(range(num_batches), "evaluate", unit="batches"):
        # Batch 1 of 8 rows, part 1 of 2: the rows 12, 13, 14 and 15.
        first = index * batch_size + part_index * part_size
        end = min(first + part_size, len(triples))
        part = [stream[i] for i in range(first, end)]
        padding = [(0, PADDING_ROW, 0)] * (part_size - len(part))
        yield gather(part + padding)


def _packed(
    corpora: Sequence[Corpus], config: DataConfig, objective: Objective, seed: int
) -> list[PackedRows]:
    rows = []
    for corpus in corpora:
        packed = PackedRows(
            corpus, objective=objective, seed=seed, block_documents=config.block_documents
        )
        rows.append(packed)
    return rows


def _check_sizes(batch_size: int, sequence_length: int, part_count: int) -> None:
    if batch_size < 1 or batch_size % part_count:
        raise UserError("batch_size", batch_size, f"must be a multiple of its {part_count} parts.")
    if sequence_length < 1:
        raise UserError("sequence_length", sequence_length, "must be at least 1.")


class _Gather:
    """Makes a batch of (source, row, epoch) triples. A class, because workers receive it by
    pickle.
    """

    def __init__(self, rows: Sequence[PackedRows]):
        self._rows = list(rows)

    def __call__(self, triples: Sequence[tuple[int, int, int]]) -> Batch:
        sources, rows, epochs = np.array(triples).T
        parts = []
        indices = []
        for source in np.unique(sources):
            index = np.flatnonzero(sources == source)
            parts.append(self._rows[source].batch(rows[index], epochs[index]))
            indices.append(index)
        if len(parts) == 1:
            return parts[0]

        # Back into the order of the triples: sources [1, 0, 1] -> indices [1], [0, 2] -> [1, 0, 2]
        order = np.argsort(np.concatenate(indices))
        batch = {}
        for name in parts[0]:
            values = np.concatenate([part[name] for part in parts])
            batch[name] = values[order]
        return batch

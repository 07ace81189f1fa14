"""Batches of packed rows: the row at global index i, with all that is drawn in it, depends on the
seed and i alone.

Row i of the stream goes to batch i // B. Of that batch, part p of P holds the rows p·B/P to
(p+1)·B/P, so the number of hosts, of workers and the shape of the mesh change who makes a row and
never which row it is.
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
from research.data.objectives import build, identity
from research.data.packing import PADDING_ROW, PackedRows
from research.data.prepare import DataConfig
from research.data.tokenizers import Tokenizer

# Held-out rows are packed and ordered in one way, whatever the seed of the run: runs are compared
# on them.
HELDOUT_SEED = 0
# Rows that an endless stream may give: Grain counts batches in floating point, which its own
# endlessness overflows.
ENDLESS = 2**50


class Loader:
    """An endless iterator over one part of every batch.

    Attributes:
      position: global index of the next row; all that a checkpoint needs (with what `state` adds as
          a check).
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
          tokenizer: what made the corpora; some objectives put its control tokens in.
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
            if objective.num_targets(corpus.offsets) > 0
        ]
        if not kept:
            raise UserError("sources", constraint="hold no text to train on.")
        self._rows = [
            PackedRows(c, objective=objective, seed=seed, block_documents=config.block_documents)
            for c, _ in kept
        ]
        self._stream = row_stream(
            [len(rows) for rows in self._rows], [weight for _, weight in kept], seed
        )
        self._config, self._batch_size = config, batch_size
        self._part_index, self._part_count = part_index, part_count
        order = [
            seed,
            sequence_length,
            config.block_documents,
            [(c.digest, weight) for c, weight in kept],
        ]
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
        """Documents of all sources that may not be cut, and are too long for a row."""
        return sum(rows.plan.dropped for rows in self._rows)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self.next()

    def next(self, state: Any = None) -> Batch:
        """Returns the next batch, which does not depend on the state of the training."""
        if self._iterator is None:
            self._iterator = self._start()
        batch = next(self._iterator)
        if (
            self._config.workers
        ):  # out of the memory shared with the workers, which is freed only when let go of
            batch = {name: np.array(values) for name, values in batch.items()}
        self.position += self._batch_size
        return batch

    def _start(self) -> grain.DatasetIterator:
        size = self._batch_size // self._part_count
        batches = self._stream[self.position : self.position + ENDLESS].batch(
            size, batch_fn=_Gather(self._rows)
        )
        mine = batches[self._part_index :: self._part_count]
        threads = grain.ReadOptions(num_threads=1, prefetch_buffer_size=self._config.prefetch)
        dataset = mine.to_iter_dataset(threads)
        if self._config.workers:
            if (
                not flags.FLAGS.is_parsed()
            ):  # Grain reads its own flags, and not every program is an absl app
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    self._config.workers, per_worker_buffer_size=self._config.prefetch
                )
            )
        return iter(dataset)

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps, as JSON holds it: the position, and a digest of what
        decides the order.
        """
        return {"position": self.position, "order": self._order}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state; batch size, processes and workers may have changed since.

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
    """Yields every held-out row exactly once, in an order that no run changes; the last batch is
    filled with padding.

    The order is mixed, so the first `max_batches` are a fair sample of the whole.

    Args:
      corpora: the held-out corpora; empty ones are passed over.
      config: objective, packing blocks.
      tokenizer: as in `Loader`.
      batch_size: rows of a batch over all processes.
      sequence_length: T.
      part_index: which part of each batch; as in `Loader`.
      part_count: number of parts; a divisor of `batch_size`.
      max_batches: stop after so many; None: all.

    Raises:
      UserError: a batch that does not divide, or nothing held out.
    """
    _check_sizes(batch_size, sequence_length, part_count)
    objective = build(config.objective, tokenizer, sequence_length)
    rows = [
        PackedRows(
            c, objective=objective, seed=HELDOUT_SEED, block_documents=config.block_documents
        )
        for c in corpora
        if objective.num_targets(c.offsets) > 0
    ]
    if not rows:
        raise UserError(
            "sources", constraint=": no document is held out; raise heldout_fraction or add text."
        )
    table = [(source, row, 0) for source, packed in enumerate(rows) for row in range(len(packed))]
    stream = grain.MapDataset.source(table).shuffle(seed=HELDOUT_SEED)
    gather = _Gather(rows)
    size = batch_size // part_count
    count = -(-len(table) // batch_size)
    for g in track(
        range(count if max_batches is None else min(count, max_batches)), "evaluate", unit="batches"
    ):
        first = g * batch_size + part_index * size
        wanted = [stream[i] for i in range(first, min(first + size, len(table)))]
        yield gather(wanted + [(0, PADDING_ROW, 0)] * (size - len(wanted)))


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
        places = [(source, np.flatnonzero(sources == source)) for source in np.unique(sources)]
        parts = [self._rows[source].batch(rows[here], epochs[here]) for source, here in places]
        if len(parts) == 1:
            return parts[0]
        back = np.argsort(np.concatenate([here for _, here in places]))
        return {name: np.concatenate([part[name] for part in parts])[back] for name in parts[0]}

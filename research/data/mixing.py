"""The order of rows: a global shuffle in every epoch, and sources mixed by weight.

The row at index i is a stateless function of (seed, i), so a run can resume at any index and any
host can compute it.
"""

from collections.abc import Sequence

import grain

from research.data.source_files import stable_hash


def row_stream(num_rows: Sequence[int], weights: Sequence[float], seed: int) -> grain.MapDataset:
    """Returns an endless dataset whose element i is (source, row, epoch); the random draws of
    a row depend on its epoch.

    Every source gives all its rows, newly shuffled, before it repeats one. Sources alternate in
    fixed proportions: after n rows, source k has given n · wₖ / Σ w of them, rounded (Grain keeps
    the proportions to within 1 % of the smallest weight).

    Args:
      num_rows: rows of each source in an epoch, at least 1.
      weights: their shares, above 0.
      seed: fixes the shuffles.
    """
    streams = []
    for source, rows in enumerate(num_rows):
        # Grain shuffles epoch e with the seed plus e: sources and runs get seeds that are far
        # apart.
        source_seed = stable_hash(f"{seed}/{source}") % 2**32
        stream = grain.MapDataset.range(rows)
        stream = stream.shuffle(seed=source_seed).repeat()
        stream = stream.map_with_index(_Tag(source, rows))
        streams.append(stream)

    if len(streams) == 1:
        return streams[0]
    return grain.MapDataset.mix(streams, list(weights))


class _Tag:
    """Adds a row's source and epoch to it; a class, because workers receive it by pickle."""

    def __init__(self, source: int, rows: int):
        self._source = source
        self._rows = rows

    def __call__(self, index: int, row: int) -> tuple[int, int, int]:
        return self._source, row, index // self._rows

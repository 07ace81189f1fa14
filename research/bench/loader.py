"""Tokens a second that the loader delivers, beside plain random crops of a token file."""

import argparse
import functools
import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import get_args

import numpy as np

from research.bench import report
from research.bench.sides import interleave_calls
from research.core.backend import cache_folder
from research.data.batch import Batch
from research.data.loader import Loader
from research.data.objectives import ObjectiveConfig
from research.data.objectives.config import Kind
from research.data.prepare import DataConfig, Prepared, prepare
from research.data.sources import SourceConfig, documents
from research.data.tokenizers import TokenizerConfig

# Rows and lengths: the shape of the quickstart, and one of a large model's microbatch.
SHAPES = ((16, 256), (8, 2048))
# What the tokenizer has where an objective puts in more than the ends of a text.
MARKS = {"mask": True, "sentinels": 100}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    report.add_arguments(parser, rounds=7)
    parser.add_argument(
        "--tokens", type=int, default=4_000_000, help="tokens a round (default 4,000,000)"
    )
    parser.add_argument(
        "--objective", choices=get_args(Kind), default="causal", help="of the rows (default causal)"
    )
    parser.add_argument(
        "--workers", type=int, default=0, help="worker processes of the loader (default 0: threads)"
    )


def main(arguments: argparse.Namespace) -> None:
    """Measures both sides interleaved on the embedded corpus, and prints rates and ratios."""
    report.check_arguments(arguments, "tokens")
    with tempfile.TemporaryDirectory(prefix="tessera-loader-") as folder:
        paired, unmarked = arguments.objective == "translate", ("causal", "prefix", "translate")
        config = DataConfig(
            sources=(pairs_of_lines(pathlib.Path(folder)) if paired else SourceConfig(),),
            tokenizer=TokenizerConfig(**({} if arguments.objective in unmarked else MARKS)),
            objective=ObjectiveConfig(kind=arguments.objective),
            workers=arguments.workers,
        )
        prepared = prepare(config, folder if paired else cache_folder() / "data")
        report.publish(
            "loader", arguments, measure(config, prepared, arguments.rounds, arguments.tokens)
        )


def pairs_of_lines(folder: pathlib.Path) -> SourceConfig:
    """Writes the embedded corpus as pairs of texts, each line and the next one, and returns them as
    a source.
    """
    texts = (document.text.splitlines() for document in documents(SourceConfig(), "train"))
    pairs = [
        pair
        for lines in texts
        for pair in itertools.pairwise(line for line in lines if line.strip())
    ]
    paths = [folder / name for name in ("read.txt", "given.txt")]
    for path, side in zip(paths, zip(*pairs, strict=True), strict=True):
        path.write_text("\n".join(side), encoding="utf-8")
    return SourceConfig(kind="lines", path=str(paths[1]), pair_path=str(paths[0]))


def measure(
    config: DataConfig, prepared: Prepared, rounds: int, tokens: int
) -> Iterator[tuple[str, report.Figure]]:
    """Yields, for each shape of batches, tokens of wall time and of CPU time.

    `loader` gives packed, shuffled, resumable rows with segments; `crops` gives random windows of
    the same token file, without documents, epochs or a position to resume from.
    """
    corpora = prepared.train
    for batch_size, sequence_length in SHAPES:
        loader = Loader(
            corpora,
            config,
            prepared.tokenizer,
            batch_size=batch_size,
            sequence_length=sequence_length,
            seed=0,
        )
        rng = np.random.default_rng(0)
        batches = max(1, tokens // (batch_size * sequence_length))
        crops = functools.partial(random_crops, corpora[0].tokens, batch_size, sequence_length, rng)
        makers = {"loader": loader.__next__, "crops": crops}
        rounds_of = interleave_calls(
            {side: functools.partial(rates, make, batches) for side, make in makers.items()}, rounds
        )
        loader.close()

        name = f"{config.objective.kind}, {batch_size} × {sequence_length:,} tokens"
        padding = f"{loader.padding:.2%} padding"
        for index, (what, unit) in enumerate(
            (("wall time", "M tokens/s"), ("CPU time", "M tokens/core-second"))
        ):
            values = {
                side: [found[index] / 1e6 for found in answers]
                for side, answers in rounds_of.items()
            }
            yield f"{name}, {what}", report.Figure(unit, True, values, note=padding)


def rates(make: Callable[[], Batch], batches: int) -> tuple[float, float]:
    """Returns tokens a second of wall time, and of CPU time of this process: all its threads, not
    its workers.

    Counted are those that a model reads, in the encoder and in the decoder; not padding.
    """
    wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for _ in range(batches):
        tokens += sum(
            np.count_nonzero(array) for name, array in make().items() if name.endswith("segments")
        )
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)


def random_crops(tokens: np.ndarray, rows: int, length: int, rng: np.random.Generator) -> Batch:
    """Returns a batch as small trainers make it: windows at random places, targets one token on."""
    starts = rng.integers(len(tokens) - length, size=rows)
    return {
        "tokens": np.stack([tokens[i : i + length].astype(np.int64) for i in starts]),
        "targets": np.stack([tokens[i + 1 : i + 1 + length].astype(np.int64) for i in starts]),
        "segments": np.ones((rows, length), np.int32),
    }

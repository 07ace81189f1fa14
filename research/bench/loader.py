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
# Control tokens of the tokenizer, for objectives that insert them.
CONTROLS = {"mask": True, "sentinels": 100}
WITHOUT_CONTROLS = ("causal", "prefix", "translate")


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
    kind = arguments.objective
    controls = {} if kind in WITHOUT_CONTROLS else CONTROLS
    with tempfile.TemporaryDirectory(prefix="tessera-loader-") as folder:
        # Pairs of texts are written for this run alone; the embedded corpus is kept for all runs.
        source = SourceConfig()
        prepared_folder = cache_folder() / "data"
        if kind == "translate":
            source = pairs_of_lines(pathlib.Path(folder))
            prepared_folder = folder
        config = DataConfig(
            sources=(source,),
            tokenizer=TokenizerConfig(**controls),
            objective=ObjectiveConfig(kind=kind),
            workers=arguments.workers,
        )
        prepared = prepare(config, prepared_folder)
        rows = measure(config, prepared, arguments.rounds, arguments.tokens)
        report.publish("loader", arguments, rows)


def pairs_of_lines(folder: pathlib.Path) -> SourceConfig:
    """Writes the embedded corpus as pairs of texts, each line and the next one, and returns them as
    a source.
    """
    # Lines a, b, c of a document -> (a, b), (b, c)
    pairs = []
    for document in documents(SourceConfig(), "train"):
        lines = [line for line in document.text.splitlines() if line.strip()]
        pairs += itertools.pairwise(lines)

    first = folder / "read.txt"
    second = folder / "given.txt"
    for path, texts in zip((first, second), zip(*pairs, strict=True), strict=True):
        path.write_text("\n".join(texts), encoding="utf-8")
    return SourceConfig(kind="lines", path=str(second), pair_path=str(first))


def measure(
    config: DataConfig, prepared: Prepared, rounds: int, tokens: int
) -> Iterator[tuple[str, report.Figure]]:
    """Yields, for each shape of batches, tokens of wall time and of CPU time.

    `loader` gives packed, shuffled, resumable rows with segments; `crops` gives random windows of
    the same token file, without documents, epochs or a position to resume from.
    """
    for batch_size, sequence_length in SHAPES:
        loader = Loader(
            prepared.train,
            config,
            prepared.tokenizer,
            batch_size=batch_size,
            sequence_length=sequence_length,
            seed=0,
        )
        rng = np.random.default_rng(0)
        token_file = prepared.train[0].tokens
        crops = functools.partial(random_crops, token_file, batch_size, sequence_length, rng)
        batches = max(1, tokens // (batch_size * sequence_length))
        sides = {
            "loader": functools.partial(rates, loader.__next__, batches),
            "crops": functools.partial(rates, crops, batches),
        }
        results = interleave_calls(sides, rounds)
        loader.close()

        # Two rows a shape: tokens a second of wall time, and of CPU time.
        name = f"{config.objective.kind}, {batch_size} × {sequence_length:,} tokens"
        padding = f"{loader.padding:.2%} padding"
        clocks = (("wall time", "M tokens/s"), ("CPU time", "M tokens/core-second"))
        for index, (clock, unit) in enumerate(clocks):
            values = {}
            for side, answers in results.items():
                values[side] = [rate[index] / 1e6 for rate in answers]
            yield f"{name}, {clock}", report.Figure(unit, True, values, note=padding)


def rates(make: Callable[[], Batch], batches: int) -> tuple[float, float]:
    """Returns tokens a second of wall time, and of CPU time of this process: all its threads, not
    its workers.

    Tokens of the encoder and of the decoder count, padding does not.
    """
    wall = time.perf_counter()
    cpu = time.process_time()
    tokens = 0
    for _ in range(batches):
        for name, array in make().items():
            if name.endswith("segments"):
                tokens += np.count_nonzero(array)
    wall = time.perf_counter() - wall
    cpu = time.process_time() - cpu
    return tokens / wall, tokens / cpu


def random_crops(tokens: np.ndarray, rows: int, length: int, rng: np.random.Generator) -> Batch:
    """Returns a batch as small trainers make it: windows at random offsets, targets one token
    later.
    """
    offsets = rng.integers(len(tokens) - length, size=rows)
    # Tokens [5, 6, 7, 8] at offset 1, length 2 -> window [6, 7], targets [7, 8]
    windows = [tokens[i : i + length].astype(np.int64) for i in offsets]
    targets = [tokens[i + 1 : i + 1 + length].astype(np.int64) for i in offsets]
    return {
        "tokens": np.stack(windows),
        "targets": np.stack(targets),
        "segments": np.ones((rows, length), np.int32),
    }

"""Tokens a second that the loader delivers, beside plain random crops of a token file."""

import argparse
import time
from collections.abc import Callable

import numpy as np

from research.core.backend import cache_folder
from research.data.loader import Loader
from research.data.objectives import Batch
from research.data.prepare import DataConfig, prepare
from research.recipes.bench import spread

# Rows and lengths: the shape of the quickstart, and one of a large model's microbatch.
SHAPES = ((16, 256), (8, 2048))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default 7)")
    parser.add_argument("--tokens", type=int, default=4_000_000, help="tokens a turn (default 4,000,000)")
    parser.add_argument("--workers", type=int, default=0, help="worker processes of the loader (default 0: threads)")


def main(arguments: argparse.Namespace) -> None:
    """Measures both sides in turns on the embedded corpus, and prints rates and ratios with their spread."""
    config = DataConfig(workers=arguments.workers)
    prepared = prepare(config, cache_folder() / "data")
    corpora = prepared.train
    print(f"loader: packed, shuffled, resumable rows with segments; {arguments.workers or 'no'} workers")
    print("crops:  random windows of the same token file, without documents, epochs or a position to resume from")
    for batch_size, sequence_length in SHAPES:
        loader = Loader(
            corpora, config, prepared.tokenizer, batch_size=batch_size, sequence_length=sequence_length, seed=0
        )
        rng = np.random.default_rng(0)

        def crops(tokens=corpora[0].tokens, rows=batch_size, length=sequence_length, rng=rng) -> Batch:
            return random_crops(tokens, rows, length, rng)

        batches = max(1, arguments.tokens // (batch_size * sequence_length))
        sides = {"loader": loader.__next__, "crops": crops}
        rounds = [{name: rates(make, batches) for name, make in sides.items()} for _ in range(arguments.rounds + 1)][1:]
        loader.close()
        print(f"batch {batch_size} x {sequence_length} tokens, {loader.padding:.2%} padding")
        for name in sides:
            for what, index in (("a second", 0), ("a core-second", 1)):
                print(f"  {name:6}  {spread([turn[name][index] / 1e6 for turn in rounds], 2)} M tokens {what}")
        print(f"  ratio   {spread([turn['loader'][0] / turn['crops'][0] for turn in rounds], 2)} loader / crops")


def rates(make: Callable[[], Batch], batches: int) -> tuple[float, float]:
    """Returns tokens a second of wall time, and of CPU time of this process: all its threads, not its workers."""
    wall, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for _ in range(batches):
        tokens += int(make()["weights"].sum())
    return tokens / (time.perf_counter() - wall), tokens / (time.process_time() - cpu)


def random_crops(tokens: np.ndarray, rows: int, length: int, rng: np.random.Generator) -> Batch:
    """Returns a batch as small trainers make it: windows at random places, targets one token on."""
    starts = rng.integers(len(tokens) - length, size=rows)
    return {
        "tokens": np.stack([tokens[i : i + length].astype(np.int64) for i in starts]),
        "targets": np.stack([tokens[i + 1 : i + 1 + length].astype(np.int64) for i in starts]),
        "weights": np.ones((rows, length), np.float32),
    }

"""Conversion of a Hugging Face folder, in and out, beside a plain copy of its files."""

import argparse
import functools
import itertools
import json
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

import numpy as np

from research.bench import report
from research.bench.llama_shapes import llama
from research.bench.sides import interleave_calls, run
from research.core.errors import UserError
from research.interop import mapping
from research.interop.architecture import choose
from research.interop.huggingface import ARCHITECTURES, write_hugging_face
from research.storage.paths import local_path

# Parameters of one layer with the widths below, and of the embeddings.
LAYER = 60_821_504
EMBEDDINGS = 2 * 1024 * 2048
DTYPES = ("float32", "bfloat16")
# What each side makes; `out` reads what `in` has made.
TARGETS = {"copy": "copy", "in": "workdir", "out": "back"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    report.add_arguments(parser, rounds=3)
    parser.add_argument("--megabytes", type=int, default=256, help="of the folder (default 256)")
    parser.add_argument(
        "--dtype", choices=(*DTYPES, "both"), default="both", help="of the folder (default both)"
    )
    parser.add_argument(
        "--folder", help="where to work: the disk to measure (default: that of temporary files)"
    )


def main(arguments: argparse.Namespace) -> None:
    """Measures the sides interleaved, each in its own process; prints rates, ratios and memory."""
    report.check_arguments(arguments, "megabytes")
    if arguments.folder is not None and not local_path("--folder", arguments.folder).is_dir():
        raise UserError("--folder", arguments.folder, "is not a folder.")
    # Both types are one bench after the other.
    dtypes = DTYPES if arguments.dtype == "both" else (arguments.dtype,)
    rows = (measure(dtype, arguments) for dtype in dtypes)
    report.publish("convert", arguments, itertools.chain.from_iterable(rows))


def measure(dtype: str, arguments: argparse.Namespace) -> Iterator[tuple[str, report.Figure]]:
    """Yields what a conversion in and one out did beside a copy of the files; all wait until theirs
    are on the disk.

    After the first round, which is not counted, the files are in the page cache.
    """
    with tempfile.TemporaryDirectory(prefix="tessera-convert-", dir=arguments.folder) as path:
        folder = pathlib.Path(path)
        size = make_folder(folder / "source", arguments.megabytes * 10**6, dtype)
        sides = {side: functools.partial(run_side, folder, side) for side in TARGETS}
        results = interleave_calls(sides, arguments.rounds)

    # Of each side: megabytes a second of every round, and the most megabytes of memory.
    rates = {}
    peaks = {}
    for side, rounds in results.items():
        rates[side] = [size / 1e6 / each["seconds"] for each in rounds]
        peaks[side] = max(each["peak_bytes"] for each in rounds) / 1e6

    # Each direction has a row, beside the copy.
    for side in ("in", "out"):
        name = f"{side}, {size / 1e6:,.0f} MB of {dtype}"
        memory = f"at most {peaks[side]:,.0f} MB of memory, the copy {peaks['copy']:,.0f}"
        values = {side: rates[side], "copy": rates["copy"]}
        yield name, report.Figure("MB/s", True, values, note=memory)


def run_side(
    folder: pathlib.Path,
    side: str,
    module: str = "research.bench.convert_sides",
    root: pathlib.Path | None = None,
) -> dict[str, float]:
    """Runs one round of a side in its own process; returns its seconds and its peak memory.

    Args:
      folder: has `source`, and gets what the sides make of it.
      side: one of `TARGETS`.
      module: of the sides.
      root: the checkout whose module it is; None is the one that is running.
    """
    # Without what the round before has made.
    target = folder / TARGETS[side]
    shutil.rmtree(target, ignore_errors=True)
    printed = run([module, side, str(folder / "source"), str(target)], root)
    return json.loads(printed)


def make_folder(folder: pathlib.Path, size: int, dtype: str) -> int:
    """Makes a Hugging Face folder of about `size` bytes of weights, and returns how many it has."""
    parameters = size / np.dtype(dtype).itemsize
    layers = max(1, round((parameters - EMBEDDINGS) / LAYER))
    config = llama(1024, layers, 2048, 8192, (32, 8, 64), 2048, is_tied=False)

    # Every parameter repeats the same noise, of which a part is made when it is read.
    noise = np.random.default_rng(0).standard_normal(2**22, dtype=np.float32)
    shapes = mapping.unrolled_shapes(config)

    def read(name: str, box: mapping.Slices) -> np.ndarray:
        whole = np.resize(noise, shapes[name].shape)
        return whole[box]

    architecture, fields = choose(ARCHITECTURES.values(), config)
    write_hugging_face(architecture, fields, config, read, folder, {}, dtype, shard_bytes=10**9)
    files = folder.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)

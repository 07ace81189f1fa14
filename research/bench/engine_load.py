"""`tessera bench engine --only=load`: how fast a checkpoint is loaded in the type that it is served
in, beside what its disk can do, and the memory that this takes.

`python -m research.bench.engine_load KIND MODEL WORKDIR DTYPE WARM_UP` is one such reading, in a
process of its own; KIND is `load` or `read`, MODEL one of `MODELS`.
"""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import psutil

from research.bench import report
from research.bench.engine_row import Row
from research.bench.llama_shapes import LLAMA_1B, LLAMA_145M, TINY
from research.bench.resident import is_measurable, measure_peak
from research.bench.sides import run
from research.core import backend
from research.interop import mapping
from research.models.config import ModelConfig
from research.models.language_model import abstract_params
from research.parallel.target import platform
from research.training.checkpoint_stream import Part, write_params
from research.training.checkpoints import CheckpointConfig, Checkpoints

SIDE = "research.bench.engine_load"
STEP = 0
MODELS = {"1 B": LLAMA_1B, "145 M": LLAMA_145M, "tiny": TINY}
# Of what is served: the goal, and what must be free.
MOST_MEMORY = 1.15
FREE_MEMORY = 1.4
LEAST_RATE = 0.7
# Bytes of one read of a file from its begin to its end.
BLOCK = 2**23
# Rows of a matrix that are drawn at a time, and the deviation of its elements.
ROWS = 8192
STDDEV = np.float32(0.02)


class Reading(NamedTuple):
    """One reading of a checkpoint.

    Attributes:
      seconds: that it took.
      stored: bytes of its files.
      from_disk: bytes that did not come from the page cache.
      served: bytes of the parameters.
      peak: bytes that were resident at most, beside those before.
    """

    seconds: float
    stored: int
    from_disk: int
    served: int
    peak: int


def unsupported_reason(
    folder: pathlib.Path, config: ModelConfig, dtype: str, *, is_written: bool
) -> str | None:
    """Returns why the loading of a model cannot be measured here, or None.

    Args:
      folder: where its checkpoint would be written.
      config: of the model.
      dtype: that it is served in.
      is_written: whether the checkpoint is there.
    """
    if not is_measurable() or not hasattr(os, "posix_fadvise"):
        return "this system tells neither peaks of memory nor what is read from the disk"
    elements = num_elements(config)
    needed = 1.1 * 4 * elements
    free = shutil.disk_usage(folder).free
    if free < needed and not is_written:
        return f"the disk has {_gigabytes(free)}, and {_gigabytes(needed)} are needed"
    needed = FREE_MEMORY * np.dtype(dtype).itemsize * elements
    free = psutil.virtual_memory().available
    if free < needed:
        return f"the memory has {_gigabytes(free)}, and {_gigabytes(needed)} are needed"
    return None


def num_elements(config: ModelConfig) -> int:
    """Returns the number of a model's parameters."""
    shapes = mapping.unrolled_shapes(config)
    return sum(math.prod(shape.shape) for shape in shapes.values())


def _gigabytes(size: int | float) -> str:
    return f"{size / 1e9:.1f} GB"


def write_model(workdir: pathlib.Path, config: ModelConfig) -> None:
    """Writes a checkpoint of random float32 parameters, a part at a time."""
    shapes = mapping.unrolled_shapes(config)
    write_params(workdir, STEP, shapes, _random_parts(shapes))


def on_first_device(shapes: Any) -> Any:
    """Returns shapes and types of arrays with the sharding of one device."""
    device = jax.local_devices()[0]
    sharding = jax.sharding.SingleDeviceSharding(device)

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes)


def load(workdir: pathlib.Path, config: ModelConfig, dtype: str) -> Any:
    """Returns the parameters of a checkpoint as `research.load` does."""
    served = dataclasses.replace(config, dtype=dtype, param_dtype=dtype)
    stored = abstract_params(config, platform())
    wanted = on_first_device(abstract_params(served, platform()))
    with contextlib.closing(Checkpoints(workdir, CheckpointConfig())) as checkpoints:
        _, params = checkpoints.stream_params(stored, wanted)
    return jax.block_until_ready(params)


def _random_parts(shapes: dict[str, jax.ShapeDtypeStruct]) -> Iterator[Part]:
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        # Scales of norms.
        if len(shape.shape) < 2:
            yield name, (), np.ones(shape.shape, np.float32)
            continue
        count, *others = shape.shape
        for start in range(0, count, ROWS):
            rows = slice(start, min(start + ROWS, count))
            values = random.standard_normal((rows.stop - start, *others), np.float32)
            values *= STDDEV
            yield name, (rows,), values


def evict(files: list[pathlib.Path]) -> None:
    """Drops files from the page cache, as far as the system follows the advice."""
    for path in files:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            # Only what is on the disk is dropped.
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_files(files: list[pathlib.Path]) -> None:
    """Reads files from begin to end, one after the other."""
    block = bytearray(BLOCK)
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(block):
                pass


def reading(
    kind: str, model: str, workdir: pathlib.Path, dtype: str, warm_up: pathlib.Path
) -> Reading:
    """Reads a checkpoint that is not in the page cache.

    Args:
      kind: `load` makes parameters of it, `read` only reads its files.
      model: whose it is.
      workdir: that has it.
      dtype: of the parameters.
      warm_up: of the tiny model, which is loaded before: what a process takes once is then there.
    """
    paths = sorted((workdir / "checkpoints").rglob("*"))
    files = [path for path in paths if path.is_file()]
    if kind == "load":
        load(warm_up, MODELS["tiny"], dtype)
    evict(files)

    def work() -> Any:
        if kind == "read":
            return read_files(files)
        return load(workdir, MODELS[model], dtype)

    process = psutil.Process()
    before = process.io_counters()
    start = time.perf_counter()
    params, peak = measure_peak(work)
    seconds = time.perf_counter() - start
    after = process.io_counters()

    # Bytes that came from the disk, and not from the page cache.
    from_disk = after.read_bytes - before.read_bytes
    stored = 0
    for path in files:
        stored += path.stat().st_size
    served = 0
    for leaf in jax.tree.leaves(params):
        served += leaf.nbytes
    return Reading(seconds, stored, from_disk, served, peak)


def readings(
    model: str, workdir: pathlib.Path, dtype: str, warm_up: pathlib.Path, rounds: int
) -> dict[str, list[Reading]]:
    """Returns readings of both kinds, interleaved, each in a process of its own.

    Args:
      model: as the other arguments but the last, of `reading`.
      workdir: as there.
      dtype: as there.
      warm_up: as there.
      rounds: of each kind.
    """
    found: dict[str, list[Reading]] = {"load": [], "read": []}
    for index in range(rounds):
        order = reversed(found) if index % 2 else found
        for kind in order:
            command = [SIDE, kind, model, str(workdir), dtype, str(warm_up)]
            values = json.loads(run(command))
            found[kind].append(Reading(**values))
    return found


def load_rows(model: str, folder: pathlib.Path, rounds: int) -> Iterator[Row]:
    """Yields, for each type, the rate at which a model is loaded beside that of its disk, and the
    most memory that this takes beside what it serves; or why not.

    Args:
      model: one of `MODELS`.
      folder: for its checkpoint.
      rounds: of each reading.
    """
    config = MODELS[model]
    write_model(folder / "tiny-loaded", MODELS["tiny"])
    is_written = False
    for dtype in ("float32", "bfloat16"):
        reason = unsupported_reason(folder, config, dtype, is_written=is_written)
        if reason is not None:
            yield Row(f"loading {model}, {dtype}", "", "left out", "", "", reason)
            continue
        if not is_written:
            write_model(folder / "loaded", config)
            is_written = True
        paths = (folder / "loaded", dtype, folder / "tiny-loaded")
        yield from rows_of(model, dtype, readings(model, *paths, rounds))


def rows_of(model: str, dtype: str, found: dict[str, list[Reading]]) -> Iterator[Row]:
    """Yields the rate and the memory of a model's loadings.

    Args:
      model: that was loaded.
      dtype: that it is served in.
      found: readings of both kinds.
    """
    loads = found["load"]
    reads = found["read"]
    rates = [_rate(each) for each in loads]
    disk = [_rate(each) for each in reads]
    ratios = []
    for ours, its in zip(rates, disk, strict=True):
        ratios.append(ours / its)
    shares = []
    for each in (*loads, *reads):
        shares.append(each.from_disk / each.stored)
    yield Row(
        f"loading {model}, {dtype}: of the disk's rate",
        f"{_gigabytes(statistics.median(rates))} a second",
        f"reading the files {_gigabytes(statistics.median(disk))} a second",
        report.spread(ratios),
        f"at least {LEAST_RATE}",
        "files dropped from the page cache by posix_fadvise; at least "
        f"{min(shares):.0%} came from the disk",
    )
    memory = [each.peak / each.served for each in loads]
    yield Row(
        f"loading {model}, {dtype}: peak of memory",
        _gigabytes(max(each.peak for each in loads)),
        f"parameters {_gigabytes(loads[0].served)}",
        report.spread(memory),
        f"at most {MOST_MEMORY}",
        "beside what the process had before",
    )


def _rate(each: Reading) -> float:
    """Returns stored bytes a second."""
    return each.stored / each.seconds


def main(kind: str, model: str, workdir: str, dtype: str, warm_up: str) -> None:
    """Prints one reading."""
    found = reading(kind, model, pathlib.Path(workdir), dtype, pathlib.Path(warm_up))
    print(json.dumps(found._asdict()))


if __name__ == "__main__":
    backend.configure()
    main(*sys.argv[1:])

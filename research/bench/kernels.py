"""Cross-entropy, grouped matmul and decode attention of this project beside their peers, measured on CPU or GPU."""

import argparse
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax

from research.bench.kernels_sides import page_bytes
from research.bench.sides import interleave, spread
from research.core.errors import UserError, nearest

SIDES = "research.bench.kernels_sides"
# What each is timed beside: all logits in float32 at once, JAX's own product, a dense cache and a copy as large.
PEERS = {"cross_entropy": ("plain",), "grouped_matmul": ("ragged_dot",), "decode_attention": ("jax.nn", "copy")}
# In the order that the sides take them.
SMALL = {
    "cross_entropy": {"tokens": 2048, "width": 512, "vocabulary": 32_064},
    "grouped_matmul": {"rows": 4096, "width": 512, "features": 1024, "experts": 8},
    "decode_attention": {"batch": 8, "length": 4096, "heads": 16, "kv_heads": 4, "head_width": 128},
}
FULL = {
    "cross_entropy": {"tokens": 8192, "width": 512, "vocabulary": 128_256},
    "grouped_matmul": {"rows": 8192, "width": 1024, "features": 2048, "experts": 64},
    "decode_attention": {"batch": 16, "length": 16_384, "heads": 32, "kv_heads": 8, "head_width": 128},
}
TURN_FLOPS = 2**36


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument("--only", default=",".join(PEERS), help=f"which of them (default {','.join(PEERS)})")
    parser.add_argument("--full", action="store_true", help="the sizes of large models; on CPU minutes and 20 GB")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side (default 7)")
    parser.add_argument("--json", metavar="FILE", help="where to write every turn as JSON")


def main(arguments: argparse.Namespace) -> None:
    """Measures the kernels asked for in turns with their peers, and prints times and ratios with their spread."""
    if arguments.rounds < 1:
        raise UserError(f"--rounds = {arguments.rounds} must be at least 1.")
    kernels = arguments.only.split(",")
    for kernel in kernels:
        if kernel not in PEERS:
            raise UserError(f"--only = {kernel!r} is no kernel of this bench. {nearest(kernel, PEERS)}")
    # Several processes share the device, so none may take all of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() == "tpu":
        raise UserError("bench kernels needs a CPU or a GPU: no two processes share a TPU.")
    report = []
    for kernel in kernels:
        sizes = (FULL if arguments.full else SMALL)[kernel]
        for dtype in ("bfloat16",) if jax.default_backend() == "gpu" else ("float32", "bfloat16"):
            report.append(measure(kernel, dtype, sizes, arguments.rounds))
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")


def measure(kernel: str, dtype: str, sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    """Times one kernel and its peers in turns; prints and returns milliseconds a call of every turn."""
    numbers = [str(size) for size in sizes.values()]
    count = max(1, TURN_FLOPS // flops(kernel, sizes))
    commands = {side: [SIDES, "turns", kernel, side, dtype, *numbers] for side in ("tessera", *PEERS[kernel])}
    seconds = interleave(commands, rounds, count)
    times = {side: [1000 * taken / count for taken in turns] for side, turns in seconds.items()}
    print(f"{kernel}, {dtype}, {', '.join(f'{name} {size:,}' for name, size in sizes.items())}")
    for side, turns in times.items():
        print(f"  {side:10} {spread(turns, 1)} ms")
    for side in [side for side in PEERS[kernel] if side != "copy"]:
        ratios = [us / them for us, them in zip(times["tessera"], times[side], strict=True)]
        print(f"  {spread(ratios, 2)} times the time of {side}, turn by turn", flush=True)
    more = {"cross_entropy": memory, "grouped_matmul": rate, "decode_attention": bandwidth}[kernel]
    return {"kernel": kernel, "dtype": dtype, **sizes, "milliseconds": times} | more(dtype, sizes, times)


def flops(kernel: str, sizes: dict[str, int]) -> int:
    """Returns the operations of the products that a call cannot do without."""
    if kernel == "cross_entropy":
        return 6 * sizes["tokens"] * sizes["width"] * sizes["vocabulary"]
    if kernel == "grouped_matmul":
        return 6 * sizes["rows"] * sizes["width"] * sizes["features"]
    return 4 * sizes["batch"] * sizes["length"] * sizes["heads"] * sizes["head_width"]


def memory(dtype: str, sizes: dict[str, int], times: dict[str, list[float]]) -> dict[str, Any]:
    """Prints and returns the compiled temporaries of each side, and what all float32 logits would take."""
    logits = 4 * sizes["tokens"] * sizes["vocabulary"]
    report = {"logits_bytes": logits, "temporary_bytes": {}}
    for side in times:
        command = [SIDES, "temporaries", "cross_entropy", side, dtype, *map(str, sizes.values())]
        found = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
        assert found.returncode == 0, found.stderr[-2000:]
        report["temporary_bytes"][side] = taken = int(found.stdout.splitlines()[-1])
        print(
            f"  {side:10} {taken / 1e6:,.1f} MB of temporaries, {taken / logits:.1%} of the float32 logits", flush=True
        )
    return report


def rate(dtype: str, sizes: dict[str, int], times: dict[str, list[float]]) -> dict[str, Any]:
    """Prints and returns useful operations a second: each row with one expert."""
    work = flops("grouped_matmul", sizes)
    rates = {side: [work / (1e6 * turn) for turn in turns] for side, turns in times.items()}
    for side, values in rates.items():
        print(f"  {side:10} {spread(values, 1)} useful GFLOP/s", flush=True)
    return {"gigaflops": rates}


def bandwidth(dtype: str, sizes: dict[str, int], times: dict[str, list[float]]) -> dict[str, Any]:
    """Prints and returns gigabytes a second: of the pages that are read, and of what the copy reads and writes."""
    read = page_bytes(dtype, *(sizes[name] for name in ("batch", "length", "kv_heads", "head_width")))
    rates = {}
    for side, factor, what in (("tessera", 1, "of pages read"), ("copy", 2, "read and written")):
        rates[side] = [factor * read / (1e6 * turn) for turn in times[side]]
        print(f"  {side:10} {spread(rates[side], 2)} GB/s {what}")
    shares = [us / them for us, them in zip(rates["tessera"], rates["copy"], strict=True)]
    print(f"  {spread(shares, 2)} of the copy's bandwidth, turn by turn", flush=True)
    return {"page_bytes": read, "gigabytes_a_second": rates}


if __name__ == "__main__":
    # The other benches of the command line need packages for data; this one runs where there is JAX and little else.
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    main(parser.parse_args())

"""Cross-entropy, grouped matmul and decode attention of this project beside their peers, measured
on CPU or GPU.
"""

import argparse
import itertools
import os
from collections.abc import Iterator

import jax

from research.bench import report
from research.bench.kernels_sides import page_bytes
from research.bench.sides import interleave_workers, run
from research.core.errors import UserError, nearest

SIDES = "research.bench.kernels_sides"
# The peers of each: all logits in float32 at once, JAX's own product, a dense cache and a copy of
# the same size.
PEERS = {
    "cross_entropy": ("plain",),
    "grouped_matmul": ("ragged_dot",),
    "decode_attention": ("jax.nn", "copy"),
}
# In the order of the arguments of `kernels_sides`.
SMALL = {
    "cross_entropy": {"tokens": 2048, "width": 512, "vocabulary": 32_064},
    "grouped_matmul": {"rows": 4096, "width": 512, "features": 1024, "experts": 8},
    "decode_attention": {"batch": 8, "length": 4096, "heads": 16, "kv_heads": 4, "head_width": 128},
}
FULL = {
    "cross_entropy": {"tokens": 8192, "width": 512, "vocabulary": 128_256},
    "grouped_matmul": {"rows": 8192, "width": 1024, "features": 2048, "experts": 64},
    "decode_attention": {
        "batch": 16,
        "length": 16_384,
        "heads": 32,
        "kv_heads": 8,
        "head_width": 128,
    },
}
# A side is called until it has done this work in a round.
ROUND_FLOPS = 2**36


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument(
        "--only", default=",".join(PEERS), help=f"which of them (default {','.join(PEERS)})"
    )
    parser.add_argument(
        "--full", action="store_true", help="the sizes of large models; on CPU minutes and 20 GB"
    )
    report.add_arguments(parser, rounds=7)


def main(arguments: argparse.Namespace) -> None:
    """Measures kernels interleaved with their peers, and prints times and ratios."""
    report.check_arguments(arguments)
    kernels = arguments.only.split(",")
    for kernel in kernels:
        if kernel not in PEERS:
            raise UserError(
                "--only", kernel, f"is no kernel of this bench. {nearest(kernel, PEERS)}"
            )
    # Several processes share the device, so none may take all of its memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if jax.default_backend() == "tpu":
        raise UserError("bench kernels needs a CPU or a GPU: no two processes share a TPU.")
    dtypes = ("bfloat16",) if jax.default_backend() == "gpu" else ("float32", "bfloat16")
    sizes = FULL if arguments.full else SMALL
    rows = (
        measure(kernel, dtype, sizes[kernel], arguments.rounds)
        for kernel in kernels
        for dtype in dtypes
    )
    report.publish("kernels", arguments, itertools.chain.from_iterable(rows))


def measure(
    kernel: str, dtype: str, sizes: dict[str, int], rounds: int
) -> Iterator[tuple[str, report.Figure]]:
    """Times one kernel and its peers interleaved; yields the milliseconds a call, and what else its
    row has.
    """
    work = flops(kernel, sizes)
    calls = max(1, ROUND_FLOPS // work)
    numbers = [str(size) for size in sizes.values()]
    commands = {}
    for side in ("tessera", *PEERS[kernel]):
        commands[side] = [SIDES, "time", kernel, side, dtype, *numbers]
    seconds = interleave_workers(commands, rounds, calls)
    times = {side: report.milliseconds(values, calls) for side, values in seconds.items()}

    name = f"{kernel}, {dtype}, {report.sizes_text(sizes)}"
    if kernel == "cross_entropy":
        yield name, report.Figure("ms", False, times, note=memory(dtype, sizes))
    elif kernel == "grouped_matmul":
        # Useful is each row with one expert.
        rates = [work / (1e6 * taken) for taken in times["tessera"]]
        note = f"{report.spread(rates)} useful GFLOP/s"
        yield name, report.Figure("ms", False, times, note=note)
    else:
        compared = {side: times[side] for side in ("tessera", "jax.nn")}
        yield name, report.Figure("ms", False, compared)
        yield f"{name}, bandwidth of pages and of a copy", bandwidth(dtype, sizes, times)


def flops(kernel: str, sizes: dict[str, int]) -> int:
    """Returns the operations of the matrix products that a call needs."""
    # Forward and two backward products of 2 operations.
    if kernel == "cross_entropy":
        return 6 * sizes["tokens"] * sizes["width"] * sizes["vocabulary"]
    if kernel == "grouped_matmul":
        return 6 * sizes["rows"] * sizes["width"] * sizes["features"]
    # Scores and their product with the values, without gradients.
    pairs = sizes["batch"] * sizes["length"] * sizes["heads"]
    return 4 * pairs * sizes["head_width"]


def memory(dtype: str, sizes: dict[str, int]) -> str:
    """Returns a note on the compiled temporaries of each side of cross-entropy."""
    logits = 4 * sizes["tokens"] * sizes["vocabulary"]
    numbers = [str(size) for size in sizes.values()]
    parts = []
    for side in ("tessera", *PEERS["cross_entropy"]):
        printed = run([SIDES, "temporaries", "cross_entropy", side, dtype, *numbers])
        size = int(printed.splitlines()[-1])
        share = size / logits
        parts.append(f"{side} {size / 1e6:,.1f} MB ({share:.1%})")
    return f"temporaries (and part of the float32 logits): {', '.join(parts)}"


def bandwidth(dtype: str, sizes: dict[str, int], times: dict[str, list[float]]) -> report.Figure:
    """Returns gigabytes a second: of the pages that are read, and of what the copy reads and
    writes.
    """
    names = ("batch", "length", "kv_heads", "head_width")
    pages = page_bytes(dtype, *(sizes[name] for name in names))
    moved = {"tessera": pages, "copy": 2 * pages}
    rates = {}
    for side, size in moved.items():
        rates[side] = [size / (1e6 * taken) for taken in times[side]]
    return report.Figure("GB/s", True, rates)


if __name__ == "__main__":
    # The command line imports all benches, some of which need packages for data; this one needs JAX
    # and little else.
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    main(parser.parse_args())

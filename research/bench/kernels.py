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
# What each is timed beside: all logits in float32 at once, JAX's own product, a dense cache and a
# copy as large.
PEERS = {
    "cross_entropy": ("plain",),
    "grouped_matmul": ("ragged_dot",),
    "decode_attention": ("jax.nn", "copy"),
}
# In the order that the sides take them.
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
    """Measures the kernels asked for interleaved with their peers, and prints times and ratios with
    their spread.
    """
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
    cases = [(kernel, dtype) for kernel in kernels for dtype in dtypes]
    sizes = FULL if arguments.full else SMALL
    rows = (measure(kernel, dtype, sizes[kernel], arguments.rounds) for kernel, dtype in cases)
    report.publish("kernels", arguments, itertools.chain.from_iterable(rows))


def measure(
    kernel: str, dtype: str, sizes: dict[str, int], rounds: int
) -> Iterator[tuple[str, report.Figure]]:
    """Times one kernel and its peers interleaved; yields the milliseconds a call, and what else its
    row has.
    """
    numbers = [str(size) for size in sizes.values()]
    count = max(1, ROUND_FLOPS // flops(kernel, sizes))
    commands = {
        side: [SIDES, "time", kernel, side, dtype, *numbers] for side in ("tessera", *PEERS[kernel])
    }
    seconds = interleave_workers(commands, rounds, count)
    times = {side: [1000 * taken / count for taken in values] for side, values in seconds.items()}
    name = f"{kernel}, {dtype}, {', '.join(f'{name} {size:,}' for name, size in sizes.items())}"
    if kernel == "cross_entropy":
        yield name, report.Figure("ms", False, times, note=memory(dtype, sizes))
    elif kernel == "grouped_matmul":
        # Useful is each row with one expert.
        rates = {
            side: [flops(kernel, sizes) / (1e6 * value) for value in values]
            for side, values in times.items()
        }
        yield (
            name,
            report.Figure(
                "ms", False, times, note=f"{report.spread(rates['tessera'])} useful GFLOP/s"
            ),
        )
    else:
        yield (
            name,
            report.Figure("ms", False, {side: times[side] for side in ("tessera", "jax.nn")}),
        )
        yield f"{name}, bandwidth of pages and of a copy", bandwidth(dtype, sizes, times)


def flops(kernel: str, sizes: dict[str, int]) -> int:
    """Returns the operations of the products that a call cannot do without."""
    if kernel == "cross_entropy":
        return 6 * sizes["tokens"] * sizes["width"] * sizes["vocabulary"]
    if kernel == "grouped_matmul":
        return 6 * sizes["rows"] * sizes["width"] * sizes["features"]
    return 4 * sizes["batch"] * sizes["length"] * sizes["heads"] * sizes["head_width"]


def memory(dtype: str, sizes: dict[str, int]) -> str:
    """Returns what is said of the compiled temporaries of each side of cross-entropy."""
    logits = 4 * sizes["tokens"] * sizes["vocabulary"]
    taken = {}
    for side in ("tessera", *PEERS["cross_entropy"]):
        printed = run(
            [SIDES, "temporaries", "cross_entropy", side, dtype, *map(str, sizes.values())]
        )
        taken[side] = int(printed.splitlines()[-1])
    parts = [f"{side} {size / 1e6:,.1f} MB ({size / logits:.1%})" for side, size in taken.items()]
    return f"temporaries (and part of the float32 logits): {', '.join(parts)}"


def bandwidth(dtype: str, sizes: dict[str, int], times: dict[str, list[float]]) -> report.Figure:
    """Returns gigabytes a second: of the pages that are read, and of what the copy reads and
    writes.
    """
    read = page_bytes(
        dtype, *(sizes[name] for name in ("batch", "length", "kv_heads", "head_width"))
    )
    factors = {"tessera": 1, "copy": 2}
    rates = {
        side: [factor * read / (1e6 * value) for value in times[side]]
        for side, factor in factors.items()
    }
    return report.Figure("GB/s", True, rates)


if __name__ == "__main__":
    # The other benches of the command line need packages for data; this one runs where there is JAX
    # and little else.
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    main(parser.parse_args())

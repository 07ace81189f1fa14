"""Attention of this project beside its peers: measured on CPU and GPU; on TPU counted in the
instruction schedule.
"""

import argparse
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from research.bench import report
from research.bench.machine import without_torch_bfloat16
from research.bench.sides import interleave_workers, process_error
from research.core.errors import UserError, nearest
from research.scaling.topology import TPU_TOPOLOGIES, tpu_devices

SIDES = "research.bench.attention_sides"
COUNT = "research.bench.attention_count"
TARGETS = ("cpu", "gpu", "tpu-schedule")
# batch, tokens, heads, head width
CPU_SHAPES = ((16, 256, 6, 64), (2, 2048, 12, 64))
GPU_SHAPES = ((4, 4096, 16, 128), (1, 16384, 16, 128))
# Block sizes of splash attention, of which the best counts: queries, keys, and keys computed at a
# time.
SPLASH_BLOCKS = (
    (512, 512, 512),
    (512, 1024, 512),
    (1024, 1024, 512),
    (1024, 1024, 1024),
    (1024, 2048, 512),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument(
        "--target", choices=TARGETS, default="cpu", help="what it is for (default cpu)"
    )
    parser.add_argument(
        "--chips", default="v5e,v5p,v6e", help="of tpu-schedule (default v5e,v5p,v6e)"
    )
    parser.add_argument(
        "--lengths", default="4096,16384", help="tokens, of tpu-schedule (default 4096,16384)"
    )
    report.add_arguments(parser, rounds=7)


def main(arguments: argparse.Namespace) -> None:
    """Measures or counts, and prints the ratios."""
    report.check_arguments(arguments)
    if arguments.target == "tpu-schedule":
        rows = schedules(_chips(arguments.chips), _lengths(arguments.lengths))
    else:
        rows = measurements(arguments.target, arguments.rounds)
    report.publish("attention", arguments, rows)


def _chips(text: str) -> list[str]:
    # "v5e,v6e" -> ["v5e", "v6e"]
    chips = text.split(",")
    for chip in chips:
        if chip not in TPU_TOPOLOGIES:
            advice = nearest(chip, TPU_TOPOLOGIES)
            raise UserError("--chips", text, f"names {chip!r}, no TPU generation. {advice}")
    return chips


def _lengths(text: str) -> list[int]:
    # "4096,16384" -> [4096, 16384]
    lengths = []
    for part in text.split(","):
        length = int(part) if part.isdigit() else 0
        if length == 0 or length % 2048:
            raise UserError(
                "--lengths",
                text,
                "must be multiples of 2048, which all block sizes of the peer divide.",
            )
        lengths.append(length)
    return lengths


def measurements(target: str, rounds: int) -> Iterator[tuple[str, report.Figure]]:
    """Times forward plus backward of each side, causal; yields rows of milliseconds."""
    backend = jax.default_backend()
    if target == "gpu" and backend != "gpu":
        raise UserError("--target", target, f"needs a GPU: the backend is {backend!r}.")
    shapes = CPU_SHAPES
    dtypes = ("float32", "bfloat16")
    if target == "gpu":
        shapes = GPU_SHAPES
        dtypes = ("bfloat16",)

    # A row for each shape and type.
    for shape, dtype in itertools.product(shapes, dtypes):
        yield _measurement(target, shape, dtype, rounds)


def _measurement(
    target: str, shape: tuple[int, ...], dtype: str, rounds: int
) -> tuple[str, report.Figure]:
    batch, length, heads, width = shape
    peers, skipped = _peers(target, dtype)
    sizes = [str(size) for size in shape]
    commands = {}
    for side in ("tessera", *peers):
        commands[side] = [SIDES, side, dtype, *sizes]

    # Short sequences are called several times a round.
    pairs_of_head = batch * length**2
    calls = max(1, 2**23 // pairs_of_head)
    seconds = interleave_workers(commands, rounds, calls)
    times = {}
    for side, values in seconds.items():
        times[side] = report.milliseconds(values, calls)

    # A causal mask leaves half of the pairs; 2 products forward and 4 backward, of 2 operations.
    pairs = heads * pairs_of_head
    operations = 12 * width * pairs / 2
    best_milliseconds = min(times["tessera"])
    best = operations / best_milliseconds / 1e9
    name = f"{dtype}, {batch} × {length:,} tokens, {heads} heads of {width}"
    note = f"{best:,.3f} useful TFLOP/s at best"
    figure = report.Figure("ms", False, times, skipped, note)
    return name, figure


def _peers(target: str, dtype: str) -> tuple[list[str], dict[str, str]]:
    """Returns the peers that are measured, and why others are left out."""
    if target == "gpu":
        return ["cudnn"], {}
    if importlib.util.find_spec("torch") is None:
        return ["jax.nn"], {"torch": "it is not installed (extra `parity`)"}
    return without_torch_bfloat16(["jax.nn", "torch"], dtype)


def schedules(chips: list[str], lengths: list[int]) -> Iterator[tuple[str, report.Figure]]:
    """Counts scheduled cycles of each side, causal, bfloat16, 16 heads of 128; a schedule has no
    spread.
    """
    for chip in chips:
        tpu_devices(chip)  # raises where it is not known, before anything is compiled
        for length in lengths:
            ours = _count("tessera", chip, length)
            peers = []
            for blocks, fused in itertools.product(SPLASH_BLOCKS, (1, 0)):
                peer = _count("splash", chip, length, *blocks, fused)
                peers.append(peer)
            for direction in ("forward", "backward"):
                name = f"{chip}, {length:,} tokens, {direction}"
                figure = _schedule_figure(direction, ours, peers)
                yield name, figure


def _schedule_figure(
    direction: str, ours: dict[str, Any], peers: Sequence[dict[str, Any]]
) -> report.Figure:
    # The block sizes that compiled for this chip, of which the fastest counts.
    compiled = [peer for peer in peers if direction in peer]
    best = min(compiled, key=lambda peer: peer[direction]["cycles"])
    own = ours[direction]
    peer = best[direction]
    cycles = {"tessera": [own["cycles"]], "splash": [peer["cycles"]]}
    own_fullness = _fullness(own)
    peer_fullness = _fullness(peer)
    note = f"{own_fullness}; splash {peer_fullness}, blocks {best['blocks']}"
    return report.Figure("cycles", False, cycles, note=note)


def _fullness(count: dict[str, Any]) -> str:
    busy = count["busy"]
    steady = count["steady"]
    cycles = 1000 * count["cycles_per_mac"]
    full = f"matrix units {busy:.0%} full, in the steady loop {steady:.0%}"
    return f"{full}, {cycles:.4f} cycles a thousand useful multiply-adds"


def _count(side: str, chip: str, length: int, *blocks: int) -> dict[str, Any]:
    """Compiles a side in its own process: the compiler reads where to write schedules only when it
    is loaded.
    """
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
        sizes = [str(size) for size in (length, *blocks)]
        command = [sys.executable, "-m", COUNT, folder, side, chip, *sizes]
        found = subprocess.run(command, env=environment, capture_output=True, text=True)

    if found.returncode < 0:
        raise process_error(command[2:], found.returncode)
    if found.returncode and side == "splash":
        # Blocks too large for a chip's memory: this one does not compile.
        return {"blocks": blocks}
    assert found.returncode == 0, found.stderr[-2000:]
    # The program prints its counts last.
    *_, last_line = found.stdout.splitlines()
    counts = json.loads(last_line)
    return {"blocks": blocks, **counts}

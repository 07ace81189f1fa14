"""Attention of this project beside its peers: measured on CPU and GPU, counted in the schedule on TPU."""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import jax

from research.bench.sides import interleave, spread
from research.core.errors import UserError, nearest
from research.scaling.topology import TPU_TOPOLOGIES, tpu_devices

SIDES, COUNT = "research.bench.attention_sides", "research.bench.attention_count"
TARGETS = ("cpu", "gpu", "tpu-schedule")
# batch, tokens, heads, head width
CPU_SHAPES = ((16, 256, 6, 64), (2, 2048, 12, 64))
GPU_SHAPES = ((4, 4096, 16, 128), (1, 16384, 16, 128))
# Queries and keys of a block, and keys computed at a time, of which splash attention's best counts.
SPLASH_BLOCKS = ((512, 512, 512), (512, 1024, 512), (1024, 1024, 512), (1024, 1024, 1024), (1024, 2048, 512))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument("--target", choices=TARGETS, default="cpu", help="what it is for (default cpu)")
    parser.add_argument("--chips", default="v5e,v5p,v6e", help="of tpu-schedule (default v5e,v5p,v6e)")
    parser.add_argument("--lengths", default="4096,16384", help="tokens, of tpu-schedule (default 4096,16384)")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side on CPU and GPU (default 7)")
    parser.add_argument("--json", metavar="FILE", help="where to write every figure as JSON")


def main(arguments: argparse.Namespace) -> None:
    """Measures or counts, and prints the ratios."""
    if arguments.rounds < 1:
        raise UserError(f"--rounds = {arguments.rounds} must be at least 1.")
    if arguments.target == "tpu-schedule":
        report: Any = schedules(_chips(arguments.chips), _lengths(arguments.lengths))
    else:
        report = measurements(arguments.target, arguments.rounds)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n")


def _chips(text: str) -> list[str]:
    chips = text.split(",")
    for chip in chips:
        if chip not in TPU_TOPOLOGIES:
            raise UserError(f"--chips = {text} names {chip!r}, no TPU generation. {nearest(chip, TPU_TOPOLOGIES)}")
    return chips


def _lengths(text: str) -> list[int]:
    lengths = [int(part) if part.isdigit() else 0 for part in text.split(",")]
    if min(lengths) < 1 or any(length % 2048 for length in lengths):
        raise UserError(f"--lengths = {text} must be multiples of 2048, which all block sizes of the peer divide.")
    return lengths


def measurements(target: str, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Times forward plus backward of each side, causal, in turns; prints milliseconds and ratios."""
    if target == "gpu" and jax.default_backend() != "gpu":
        raise UserError(f"--target = gpu needs a GPU: the backend is {jax.default_backend()!r}.")
    peers = ["cudnn"] if target == "gpu" else ["jax.nn"]
    if target == "cpu" and importlib.util.find_spec("torch") is None:
        print("torch is left out: it is not installed (extra `parity`)")
    elif target == "cpu":
        peers.append("torch")
    report = {}
    for shape in GPU_SHAPES if target == "gpu" else CPU_SHAPES:
        for dtype in ("bfloat16",) if target == "gpu" else ("float32", "bfloat16"):
            sizes = [str(size) for size in shape]
            commands = {side: [SIDES, side, dtype, *sizes] for side in ("tessera", *peers)}
            count = max(1, 2**23 // (shape[0] * shape[1] ** 2))
            seconds = interleave(commands, rounds, count)
            name = f"{dtype} batch {shape[0]}, {shape[1]} tokens, {shape[2]} heads of {shape[3]}"
            report[name] = {side: [1000 * taken / count for taken in turns] for side, turns in seconds.items()}
            _print_times(name, report[name], 12 * shape[0] * shape[2] * shape[3] * shape[1] ** 2 / 2)
    return report


def _print_times(name: str, times: dict[str, list[float]], flops: float) -> None:
    print(f"{name}, causal, forward and backward")
    for side, turns in times.items():
        print(f"  {side:8} {spread(turns, 1)} ms, {flops / min(turns) / 1e9:,.3f} useful TFLOP/s at best")
    for side in [side for side in times if side != "tessera"]:
        ratios = [them / us for us, them in zip(times["tessera"], times[side], strict=True)]
        print(f"  {spread(ratios, 2)} times the speed of {side}, turn by turn", flush=True)


def schedules(chips: list[str], lengths: list[int]) -> list[dict[str, Any]]:
    """Counts scheduled cycles of each side, causal, bfloat16, 16 heads of 128; a schedule has no spread."""
    rows = []
    for chip in chips:
        tpu_devices(chip)
        for length in lengths:
            ours = _count("tessera", chip, length)
            peers = [_count("splash", chip, length, *blocks, fused) for blocks in SPLASH_BLOCKS for fused in (1, 0)]
            for part in ("forward", "backward"):
                best = min((peer for peer in peers if part in peer), key=lambda peer: peer[part]["cycles"])
                row = {"chip": chip, "length": length, "pass": part, "tessera": ours[part], "splash": best[part]}
                rows.append(row | {"splash_blocks": best["blocks"]})
                _print_row(rows[-1])
    return rows


def _print_row(row: dict[str, Any]) -> None:
    us, them = row["tessera"], row["splash"]
    print(f"{row['chip']} {row['length']:,} tokens {row['pass']}: {us['cycles']:,} scheduled cycles", end="")
    print(
        f", {1000 * us['cycles_per_mac']:.4f} a thousand useful multiply-adds, matrix units {us['busy']:.0%} full",
        end="",
    )
    print(f"; in the steady loop {us['steady']:.0%}")
    print(
        f"  splash at its best, {row['splash_blocks']}: {them['cycles']:,}, {1000 * them['cycles_per_mac']:.4f}", end=""
    )
    print(f", {them['busy']:.0%}; ratio {them['cycles'] / us['cycles']:.2f}", flush=True)


def _count(side: str, chip: str, length: int, *blocks: int) -> dict[str, Any]:
    """Compiles a side in a process of its own, which alone can tell the compiler where to write schedules."""
    with tempfile.TemporaryDirectory() as folder:
        flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        environment = os.environ | {"LIBTPU_INIT_ARGS": flags, "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-m", COUNT, folder, side, chip, *map(str, (length, *blocks))]
        found = subprocess.run(command, env=environment, capture_output=True, text=True)
    if found.returncode and side == "splash":
        # Blocks too large for a chip's memory are no peer.
        return {"blocks": blocks}
    assert found.returncode == 0, found.stderr[-2000:]
    return {"blocks": blocks, **json.loads(found.stdout.splitlines()[-1])}

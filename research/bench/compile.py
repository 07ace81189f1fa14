"""How long the compiler of a pod takes: 80 layers beside 8, and 4,096 chips beside 64.

Scanned layers, and one program for all devices, should cost it next to nothing.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator

from research.bench import report
from research.bench.sides import process_error
from research.core.errors import UserError

PRESET = "configs/pods/llama3.py:70b-v5p-512"
# What two sides are: overrides of the preset, and its devices. An axis of the mesh is along two
# sides of the torus at most; 64 chips have room for one row each.
LAYERS = {
    "8 layers": ("v5p:4x8x8", {"model.num_layers": 8}),
    "80 layers": ("v5p:4x8x8", {"model.num_layers": 80}),
}
CHIPS = {
    "64 chips": (
        "v5p:4x4x4",
        {"mesh.data": 4, "mesh.fsdp": 16, "train.batch_size": 64},
    ),
    "4,096 chips": (
        "v5p:16x16x16",
        {"mesh.data": 16, "mesh.fsdp": 256, "train.batch_size": 4096},
    ),
}
# name -> sides, and how many times the first one's seconds the second may take
ROWS = {"layers": (LAYERS, 1.2), "chips": (CHIPS, 1.5)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument("--config", default=PRESET, help=f"the run (default {PRESET})")
    report.add_arguments(parser, rounds=1)


def main(arguments: argparse.Namespace) -> None:
    """Compiles each side in turn, and prints the ratios of their seconds."""
    report.check_arguments(arguments)
    report.publish("compile", arguments, _rows(arguments.config, arguments.rounds))


def _rows(spec: str, rounds: int) -> Iterator[tuple[str, report.Figure]]:
    for name, (sides, most) in ROWS.items():
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        processors: dict[str, float] = dict.fromkeys(sides, 0.0)
        for _ in range(rounds):
            for side, (devices, changes) in sides.items():
                cost = _cost(spec, devices, changes)
                seconds[side].append(cost["trace_seconds"] + cost["compile_seconds"])
                processors[side] += cost["cpu_seconds"] / rounds
        less, more = processors.values()
        note = f"at most {most}; of the compiler's processor seconds {more / less:.2f}"
        yield name, report.Figure("s", False, seconds, note=note)


def _cost(spec: str, devices: str, changes: dict[str, int]) -> dict[str, float]:
    """Returns what compiling a run takes, in a process of its own."""
    overrides = [f"--config.{name}={value}" for name, value in changes.items()]
    flags = [f"--config={spec}", f"--devices={devices}", *overrides, "--json"]
    command = [sys.executable, "-m", "research", "compile", *flags]
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode < 0:
        raise process_error(command[2:], found.returncode)
    if not found.stdout:
        raise UserError(found.stderr.splitlines()[-1])
    return json.loads(found.stdout)["cost"]

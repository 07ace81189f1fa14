"""Eight devices: bytes that they send and pipelines' waiting against formulas, and step times.

Volumes are read from the programs that XLA compiles for eight host devices. XLA for CPU lacks two
passes and one exchange: it makes no reduce-scatter of a sum that is sharded afterwards, it sums the
terms of a sum over devices one by one, and it has no ragged all-to-all. So each volume above its
limit has a second row, of the program that the TPU compiler makes for as many chips.
"""

import argparse
import importlib.util
import json
import pathlib
import shlex
import statistics
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from research.bench import parallel_formulas as formulas
from research.bench import report
from research.bench.sides import interleave_workers, run
from research.core.errors import UserError, nearest

SIDE = "research.bench.parallel_side"
PARTS = ("volume", "bubble", "time")
COLUMNS = ["what", "measured", "formula, or one device", "ratio", "wanted", "also"]
MOST_VOLUME = 1.05
# Of a bubble, up and down.
MOST_BUBBLE = 0.1
# Of a bubble, each of several seconds.
BUBBLE_ROUNDS = 3
# The names of `parallel_programs.CASES`, which imports JAX.
CASES = (
    "data",
    "fsdp, zero 1",
    "fsdp, zero 2",
    "fsdp, zero 3",
    "fsdp, zero 2, not combined",
    "fsdp, zero 3, not combined",
    "tensor",
    "tensor, sequence_parallel",
    "context, ring",
    "context, all_gather",
    "context, all_to_all",
    "expert",
    "pipeline, 32 microbatches",
    "pipeline, 128 microbatches",
)
TIMED = ("data", "fsdp, zero 3")
ALONE = "one device"
# Why a program sends more than the formula.
SCATTERS = "all-reduces gradients of layers where a reduce-scatter would do"
PAIRS = "sums attention's gradients, of 4 MB, in pairs, and so without a reduce-scatter"
REASONS = {
    ("fsdp, zero 2", "cpu"): SCATTERS,
    ("fsdp, zero 3", "cpu"): SCATTERS,
    ("fsdp, zero 2, not combined", "cpu"): SCATTERS,
    ("fsdp, zero 3, not combined", "cpu"): SCATTERS,
    ("fsdp, zero 2", "tpu"): PAIRS,
    ("fsdp, zero 3", "tpu"): PAIRS,
    ("tensor", "cpu"): "sums the gradients of a sublayer's input once for each kernel",
    ("tensor, sequence_parallel", "cpu"): "the same, and all-reduces where a reduce-scatter would "
    "do",
    ("expert", "cpu"): "has no ragged all-to-all: sends as many rows as could come",
    ("pipeline, 32 microbatches", "cpu"): "all stages send in each of the M + P - 2 ticks in which "
    "one has something to send",
}


class Row(NamedTuple):
    """What is printed of a measurement; `COLUMNS`."""

    what: str
    measured: str
    formula: str
    ratio: str
    wanted: str
    also: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument(
        "--only", help=f"parts, separated by commas: {', '.join(PARTS)} (default all)"
    )
    report.add_arguments(parser, rounds=5)
    parser.add_argument("--steps", type=int, default=2, help="training steps a round (default 2)")


def main(arguments: argparse.Namespace) -> None:
    """Measures all parts, and prints and writes their rows."""
    report.check_arguments(arguments, "steps")
    wanted = PARTS if arguments.only is None else arguments.only.split(",")
    for part in wanted:
        if part not in PARTS:
            raise UserError("--only", part, f"is no part. {nearest(part, PARTS)}")

    rows = []
    for row in _rows(wanted, arguments):
        print(f"{row.what}: {row.measured}, {row.formula}: {row.ratio} ({row.wanted}) {row.also}")
        rows.append(list(row))
    if arguments.json is not None:
        flags = [f"--rounds={arguments.rounds}", f"--steps={arguments.steps}"]
        if arguments.only is not None:
            flags.append(f"--only={arguments.only}")
        command = shlex.join(["tessera", "bench", "parallel", *flags])
        report.write(pathlib.Path(arguments.json), command, columns=COLUMNS, rows=rows)


def _rows(parts: Sequence[str], arguments: argparse.Namespace) -> Iterator[Row]:
    if "volume" in parts:
        yield from _volumes()
    if "bubble" in parts:
        yield from _bubbles()
    if "time" in parts:
        yield from _times(arguments.rounds, arguments.steps)


def _volumes() -> Iterator[Row]:
    """Yields each case's bytes, and those of the TPU's program where the CPU's has too many."""
    found = json.loads(run([SIDE, "volumes", "cpu", *CASES]))
    above = []
    for name, bytes_of in found.items():
        yield volume_row(name, "cpu", bytes_of)
        # A schedule's ticks are the same on every kind of device.
        is_above = bytes_of["sent"] > MOST_VOLUME * bytes_of["formula"]
        if is_above and not name.startswith("pipeline"):
            above.append(name)

    if above and importlib.util.find_spec("libtpu") is not None:
        found = json.loads(run([SIDE, "volumes", "tpu", *above]))
        for name, bytes_of in found.items():
            yield volume_row(name, "tpu", bytes_of)


def volume_row(name: str, platform: str, bytes_of: dict[str, float]) -> Row:
    """Returns the row of a case.

    Args:
      name: of `CASES`.
      platform: that the program is for.
      bytes_of: what `parallel_programs.volume` gives.
    """
    ratio = bytes_of["sent"] / bytes_of["formula"]
    notes = []
    if ratio > MOST_VOLUME:
        reason = REASONS.get((name, platform), "no reason known")
        notes.append(f"above: {reason}")
    if bytes_of["rest"]:
        notes.append(f"sums and gathers of parameters besides: {_megabytes(bytes_of['rest'])}")
    notes.append(f"small: {_kilobytes(bytes_of['small'])}")
    return Row(
        f"bytes sent, {name}, {platform}",
        _megabytes(bytes_of["sent"]),
        _megabytes(bytes_of["formula"]),
        f"{ratio:.3f}",
        f"at most {MOST_VOLUME}",
        "; ".join(notes),
    )


def _megabytes(count: float) -> str:
    return f"{report.digits(count / 1e6)} MB"


def _kilobytes(count: float) -> str:
    return f"{report.digits(count / 1e3)} kB"


def _bubbles() -> Iterator[Row]:
    """Yields the share of a step that each schedule waits."""
    found = json.loads(run([SIDE, "bubbles", str(BUBBLE_ROUNDS)]))
    for name, bubble in found.items():
        yield bubble_row(name, bubble)


def bubble_row(name: str, measured: dict[str, Any]) -> Row:
    """Returns the row of a schedule.

    Args:
      name: of `pipeline_schedule.Name`.
      measured: the share that devices wait, and what it was measured of: `devices`,
          `microbatches`, `chunks`, and the times of a stage's operations.
    """
    devices = measured["devices"]
    microbatches = measured["microbatches"]
    chunks = measured["chunks"]
    costs = tuple(measured["costs"])
    formula = formulas.bubble(name, devices, microbatches, chunks, costs)
    ratio = measured["bubble"] / formula
    return Row(
        f"bubble, {name}",
        f"{measured['bubble']:.3f}",
        f"{formula:.3f}",
        f"{ratio:.3f}",
        f"{1 - MOST_BUBBLE} to {1 + MOST_BUBBLE}",
        f"{devices} stages that sleep, {microbatches} microbatches",
    )


def _times(rounds: int, steps: int) -> Iterator[Row]:
    """Yields the step time of eight devices beside one, of the same batch."""
    commands = {name: [SIDE, "step", name] for name in (ALONE, *TIMED)}
    seconds = interleave_workers(commands, rounds, steps)
    times = {name: report.milliseconds(values, steps) for name, values in seconds.items()}
    for name in TIMED:
        yield time_row(name, times[name], times[ALONE])


def time_row(name: str, eight: Sequence[float], one: Sequence[float]) -> Row:
    """Returns the row of a mesh of eight devices: milliseconds of each round beside one device."""
    ratios = [us / alone for us, alone in zip(eight, one, strict=True)]
    return Row(
        f"step time, {name}",
        f"{report.digits(statistics.median(eight))} ms",
        f"{report.digits(statistics.median(one))} ms",
        report.spread(ratios),
        "",
        f"{len(ratios)} pairs; all devices share this machine's cores",
    )

"""Decoding by the engine beside transformers and llama.cpp, and beside the bandwidth of memory."""

import argparse
import dataclasses
import importlib.util
import itertools
import json
import pathlib
import statistics
import tempfile
from collections.abc import Iterator, Sequence

from research.bench import machine, report
from research.bench.serving_models import MODELS, bytes_a_step, write_model
from research.bench.serving_sides import READ_BYTES
from research.bench.sides import interleave_workers, run
from research.core.errors import UserError, nearest

SIDE = "research.bench.serving_sides"
DTYPES = ("float32", "bfloat16")
# The package that each side needs; this project's own need none.
PACKAGES = {
    "tessera": None,
    "any tiles": None,
    "compiled step": None,
    "transformers": "transformers",
    "llama.cpp": "llama_cpp",
}
# Tokens of an answer that are compared with the peers' own.
COMPARED = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument("--only", help=f"models, separated by commas: {', '.join(MODELS)}")
    parser.add_argument(
        "--dtype", choices=(*DTYPES, "both"), default="both", help="of the weights (default both)"
    )
    parser.add_argument(
        "--sequences", default="1,8", help="at once, separated by commas (default 1,8; at most 8)"
    )
    parser.add_argument("--tokens", type=int, default=64, help="of an answer (default 64)")
    report.add_arguments(parser, rounds=5)


def main(arguments: argparse.Namespace) -> None:
    """Measures all sides interleaved; prints tokens a second and ratios."""
    report.check_arguments(arguments, "tokens")
    names = list(MODELS) if arguments.only is None else arguments.only.split(",")
    for name in names:
        if name not in MODELS:
            raise UserError("--only", name, f"is no model of this bench. {nearest(name, MODELS)}")
    counts = arguments.sequences.split(",")
    if not all(count.isdigit() and 1 <= int(count) <= 8 for count in counts):
        raise UserError(
            "--sequences", arguments.sequences, "must be numbers from 1 to 8, separated by commas."
        )
    shortest = min(model.max_length for model in MODELS.values())
    if arguments.tokens >= shortest:
        raise UserError("--tokens", arguments.tokens, f"must be below {shortest}.")
    dtypes = DTYPES if arguments.dtype == "both" else (arguments.dtype,)
    cases = itertools.product(names, dtypes)
    rows = (measure(name, dtype, list(map(int, counts)), arguments) for name, dtype in cases)
    report.publish("decode", arguments, itertools.chain.from_iterable(rows))


def measure(
    name: str, dtype: str, counts: Sequence[int], arguments: argparse.Namespace
) -> Iterator[tuple[str, report.Figure]]:
    """Yields a row for each number of sequences: tokens a second of all of them together."""
    sides, skipped = available_sides(dtype)
    config = dataclasses.replace(MODELS[name], dtype=dtype)
    with tempfile.TemporaryDirectory(prefix="tessera-decode-") as path:
        write_model(pathlib.Path(path), MODELS[name], dtype)
        checked = same_tokens(sides, path, dtype)
        for count in counts:
            common = [path, dtype, str(count), str(arguments.tokens)]
            commands = {side: [SIDE, "time", side, *common] for side in (*sides, "read")}
            seconds = interleave_workers(commands, arguments.rounds, 1)
            bandwidth = READ_BYTES / statistics.median(seconds.pop("read"))
            work = count * arguments.tokens
            rates = {side: [work / each for each in taken] for side, taken in seconds.items()}
            step = statistics.median(seconds["tessera"]) / arguments.tokens
            share = bytes_a_step(config, dtype) / (step * bandwidth)
            note = f"reads the weights at {share:.2f} of {bandwidth / 1e9:.0f} GB/s; {checked}"
            title = f"{name}, {dtype}, {count} at once"
            yield title, report.Figure("tokens/s", True, rates, skipped, note)


def available_sides(dtype: str) -> tuple[list[str], dict[str, str]]:
    """Returns the sides that can be measured, and why the others are left out."""
    skipped = {}
    for side, package in PACKAGES.items():
        if package is not None and importlib.util.find_spec(package) is None:
            skipped[side] = f"{package} is not installed"
    if dtype == "bfloat16":
        skipped.setdefault("llama.cpp", "is measured in float32")
        _, without_torch = machine.without_torch_bfloat16(["torch"], dtype)
        for reason in without_torch.values():
            skipped.setdefault("transformers", reason)
    return [side for side in PACKAGES if side not in skipped], skipped


def same_tokens(sides: Sequence[str], folder: str, dtype: str) -> str:
    """Returns which sides give the first tokens that the first one gives."""
    found = {}
    for side in sides:
        printed = run([SIDE, "tokens", side, folder, dtype, "1", str(COMPARED)])
        [found[side]] = json.loads(printed)
    wanted = found[sides[0]]
    parts = []
    for side in sides[1:]:
        pairs = zip(found[side], wanted, strict=True)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), COMPARED)
        parts.append(f"{side} {same}")
    return f"of {COMPARED} first tokens the same as {', '.join(parts)}"

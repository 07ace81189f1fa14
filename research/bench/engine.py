"""The engine under load: requests that arrive at random, shared prefixes, guesses, its start, its
memory.
"""

import argparse
import importlib.util
import itertools
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

from research.bench import report
from research.bench.engine_load import load_rows
from research.bench.engine_mtp import mtp_rows
from research.bench.engine_row import COLUMNS, Row
from research.bench.engine_sides import LOOKUP_DRAFTS, MEMORY_AT, SHARED
from research.bench.engine_steps import step_rows
from research.bench.llama_shapes import TINY
from research.bench.serving_models import MODELS, write_model
from research.bench.sides import run
from research.core.errors import UserError, nearest

SIDE = "research.bench.engine_sides"
ACCELERATOR_SIDE = "research.bench.engine_accelerator"
# Of the accelerator's part.
SHAPE = "configs/model/llama.py:3-8b"
PARTS = (
    "arrivals",
    "prefix",
    "lookup",
    "start",
    "programs",
    "memory",
    "load",
    "mtp",
    "accelerator",
    "steps",
)
# The package that each peer needs.
PEERS = {"transformers": "transformers", "llama.cpp": "llama_cpp"}
MODEL = MODELS["GPT-2 124 M"]
LOADED = "1 B"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument(
        "--only", help=f"parts, separated by commas: {', '.join(PARTS)} (default all)"
    )
    report.add_arguments(parser, rounds=5)
    parser.add_argument("--requests", type=int, default=64, help="that arrive (default 64)")
    parser.add_argument(
        "--rate", type=float, default=1.0, help="of them a second, in the mean (default 1)"
    )
    parser.add_argument(
        "--mtp_workdir",
        help="of a model with multi-token prediction (default: one is trained by "
        "configs/pretrain/deepseek.py)",
    )
    parser.add_argument(
        "--draft_workdir", help="of a draft model with its tokenizer (default: none is compared)"
    )


def main(arguments: argparse.Namespace) -> None:
    """Measures the parts, and prints and writes their rows."""
    report.check_arguments(arguments, "requests")
    if arguments.rate <= 0:
        raise UserError("--rate", arguments.rate, "must be above 0.")
    parts = PARTS if arguments.only is None else arguments.only.split(",")
    for part in parts:
        if part not in PARTS:
            raise UserError("--only", part, f"is no part. {nearest(part, PARTS)}")

    rows = []
    with tempfile.TemporaryDirectory(prefix="tessera-engine-") as path:
        folder = pathlib.Path(path)
        write_model(folder / "model", MODEL, "float32")
        for row in _rows(parts, folder, arguments):
            print(f"{row.what}: {row.measured}, {row.beside}: {row.ratio} ({row.wanted})", row.also)
            sys.stdout.flush()
            rows.append(list(row))
    if arguments.json is not None:
        flags = [f"--{name}={vars(arguments)[name]}" for name in ("rounds", "requests", "rate")]
        if arguments.only is not None:
            flags.append(f"--only={arguments.only}")
        command = shlex.join(["tessera", "bench", "engine", *flags])
        report.write(pathlib.Path(arguments.json), command, columns=COLUMNS, rows=rows)


def _rows(
    parts: Sequence[str], folder: pathlib.Path, arguments: argparse.Namespace
) -> Iterator[Row]:
    model = str(folder / "model")
    rounds = str(arguments.rounds)
    if "arrivals" in parts:
        yield from _arrivals(model, arguments.requests, arguments.rate)
    if "prefix" in parts:
        yield from prefix_rows(_measured("prefix", model, rounds))
    if "lookup" in parts:
        yield from lookup_rows(_measured("lookup", model, rounds))
    if "start" in parts:
        yield from _starts(folder)
    if "programs" in parts:
        yield programs_row(_measured("programs", model)["compile"])
    if "memory" in parts:
        write_model(folder / "tiny", TINY, "float32")
        yield memory_row(_measured("memory", str(folder / "tiny"))["bytes"])
    if "load" in parts:
        yield from load_rows(LOADED, folder, arguments.rounds)
    if "mtp" in parts:
        workdirs = (arguments.mtp_workdir, arguments.draft_workdir)
        yield from mtp_rows(folder, *workdirs, arguments.rounds)
    if "accelerator" in parts:
        yield from accelerator_rows(json.loads(run([ACCELERATOR_SIDE, SHAPE, rounds])))
    if "steps" in parts:
        yield from step_rows()


def accelerator_rows(found: dict[str, Any]) -> Iterator[Row]:
    """Yields what was measured on an accelerator, or why nothing was.

    Args:
      found: as `engine_accelerator` prints it.
    """
    if "reason" in found:
        yield Row("a large shape on an accelerator", "", "left out", "", "", found["reason"])
        return
    for cells in found["rows"]:
        yield Row(*cells)


def _measured(*arguments: str) -> dict[str, list[float]]:
    return json.loads(run([SIDE, *arguments]))


def _arrivals(model: str, requests: int, rate: float) -> Iterator[Row]:
    """Yields the times of the engine and of each peer, one after the other: each has the machine
    alone.
    """
    ours = _measured("arrive", model, "tessera", str(requests), str(rate))
    for peer, package in PEERS.items():
        if importlib.util.find_spec(package) is None:
            reason = f"{package} is not installed"
            yield Row(f"{requests} arrivals, {peer}", "", "left out", "", "", reason)
            continue
        theirs = _measured("arrive", model, peer, str(requests), str(rate))
        yield from arrival_rows(peer, requests, rate, ours, theirs)


def arrival_rows(
    peer: str,
    requests: int,
    rate: float,
    ours: dict[str, list[float]],
    theirs: dict[str, list[float]],
) -> Iterator[Row]:
    """Yields the percentiles of the times to the first and to the next token.

    Args:
      peer: beside which.
      requests: that came.
      rate: of them a second.
      ours: seconds to first and next tokens.
      theirs: the same of the peer.
    """
    for token in ("first", "next"):
        for percent in (50, 99):
            own = float(np.percentile(ours[token], percent))
            other = float(np.percentile(theirs[token], percent))
            yield Row(
                f"{requests} arrivals, {rate} a second: {token} token, p{percent}",
                _milliseconds(own),
                f"{peer} {_milliseconds(other)}",
                f"{report.digits(other / own)} times as soon",
                "",
                f"{peer} answers one after the other",
            )


def _milliseconds(seconds: float) -> str:
    return f"{report.digits(1000 * seconds)} ms"


def prefix_rows(found: dict[str, list[float]]) -> Iterator[Row]:
    """Yields what a shared prefix saves, and what the prefix cache costs where nothing is shared.

    Args:
      found: as of `engine_sides.prefix`.
    """
    cases = (
        (f"first token after {SHARED:,} shared tokens", "warm", "cold", "at least 5"),
        ("nothing is shared: prefix cache", "cached", "plain", "at least 0.99"),
    )
    for what, ours, other, wanted in cases:
        yield _ratio_row(what, found[ours], other, found[other], wanted)


def lookup_rows(found: dict[str, list[float]]) -> Iterator[Row]:
    """Yields what look-up gains on a text that repeats itself, and costs where many run.

    Args:
      found: as of `engine_sides.lookup`.
    """
    cases = (
        ("one", "a text that repeats itself", "at least 1.8"),
        ("many", "32 running", "at least 0.97"),
    )
    for drafts, (case, what, wanted) in itertools.product(LOOKUP_DRAFTS, cases):
        own = found[f"{case}, {drafts} guesses"]
        name = f"look-up, {drafts} guesses, {what}"
        yield _ratio_row(name, own, "none", found[f"{case}, plain"], wanted)


def _ratio_row(
    what: str, ours: Sequence[float], name: str, others: Sequence[float], wanted: str
) -> Row:
    ratios = [other / own for own, other in zip(ours, others, strict=True)]
    return Row(
        what,
        _milliseconds(statistics.median(ours)),
        f"{name} {_milliseconds(statistics.median(others))}",
        report.spread(ratios),
        wanted,
        f"{len(ratios)} pairs",
    )


def _starts(folder: pathlib.Path) -> Iterator[Row]:
    """Yields the seconds from `tessera sample` to its first token, with an empty compilation cache
    and with the one that it leaves.
    """
    workdir = folder / "workdir"
    write_tokenizer(folder / "model")
    tessera = [sys.executable, "-m", "research"]
    run(["research", "convert", f"--from={folder / 'model'}", f"--to={workdir}"])
    environment = {**os.environ, "TESSERA_CACHE": str(folder / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    for kind, wanted in (("no", 10), ("a warm", 4)):
        start = time.perf_counter()
        command = [*tessera, "sample", f"--workdir={workdir}", "--prompt=a", "--max_tokens=1"]
        found = subprocess.run(command, env=environment, capture_output=True, text=True)
        seconds = time.perf_counter() - start
        if found.returncode:
            raise UserError(f"tessera sample ended with {found.returncode}: {found.stderr}")
        what = f"from the command to the first token, {kind} compilation cache"
        measured = f"{report.digits(seconds)} s"
        yield Row(what, measured, "", "", f"at most {wanted} s", "GPT-2 124 M, to its end")


def write_tokenizer(folder: pathlib.Path) -> None:
    """Writes a tokenizer of bytes in the form of `transformers`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def programs_row(seconds: Sequence[float]) -> Row:
    """Returns how many programs are compiled for how long.

    Args:
      seconds: of each compilation of an engine's start.
    """
    large = [each for each in seconds if each > 0.5]
    total = f"{report.digits(sum(seconds))} s"
    also = f"the {len(large)} above half a second take {report.digits(sum(large))} s"
    return Row("compiled programs", f"{len(seconds)}", total, "", "", also)


def memory_row(found: Sequence[float]) -> Row:
    """Returns the row of the memory after some requests and after many.

    Args:
      found: bytes.
    """
    some, many = found
    few_requests, many_requests = MEMORY_AT
    return Row(
        f"memory after {many_requests:,} requests",
        f"{many / 1e6:,.1f} MB",
        f"after {few_requests:,} {some / 1e6:,.1f} MB",
        f"{many / some:.3f}",
        "at most 1.02",
        "a tiny model",
    )

"""This checkout beside an earlier commit of it: the same steps and kernels, in turns on the same machine."""

import argparse
import contextlib
import json
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence

import research
from research.bench.attention import CPU_SHAPES
from research.bench.sides import spread, worker
from research.core.errors import UserError, nearest

ROOT = pathlib.Path(research.__file__).parent.parent
FAMILIES = ("gpt2", "gemma", "mixtral", "deepseek", "t5", "bert")
# Sides that answer turns, by the name of their row: a module of `research.bench`, and its arguments.
STEPS = {
    "train": ("train_sides", "tessera", "float32"),
    **{f"attention {'x'.join(map(str, s))}": ("attention_sides", "tessera", "float32", *s) for s in CPU_SHAPES},
    **{f"family {name}": ("families_side", name, "float32") for name in FAMILIES},
}
# Whole benches, and what their figure looks like in what they print; a higher one is better.
BENCHES = {
    "loader": (("loader", "--rounds=3"), r"loader +([\d.]+) .*a core-second"),
    "convert in": (("convert", "--megabytes=500", "--rounds=1"), r"in +([\d,]+) .*MB/s"),
    "convert out": (("convert", "--megabytes=500", "--rounds=1"), r"out +([\d,]+) .*MB/s"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument("--before", required=True, metavar="COMMIT", help="the commit to measure this checkout against")
    parser.add_argument("--only", help="rows, separated by commas, or beginnings of their names: train,attention")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default 5)")
    parser.add_argument("--json", metavar="FILE", help="where to write the ratios of every turn as JSON")


def main(arguments: argparse.Namespace) -> None:
    """Measures both checkouts in turns, and prints the ratios of their speeds with their spread."""
    if arguments.rounds < 1:
        raise UserError(f"--rounds = {arguments.rounds} must be at least 1.")
    rows = _rows(arguments.only)
    ratios: dict[str, list[float]] = {}
    with _checkout(arguments.before) as before:
        for row in rows:
            measure = _step_ratios if row in STEPS else _bench_ratios
            ratios[row] = measure(row, before, arguments.rounds)
            print(f"{row:28} {spread(ratios[row], 3)} of the speed at {arguments.before}", flush=True)
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(ratios, indent=2) + "\n")


def _rows(only: str | None) -> list[str]:
    known = [*STEPS, *BENCHES]
    if only is None:
        return known
    wanted = []
    for name in only.split(","):
        found = [row for row in known if row.startswith(name)]
        if not found:
            raise UserError(f"--only = {name!r} is the beginning of no row. {nearest(name, known)}")
        wanted += found
    return wanted


@contextlib.contextmanager
def _checkout(commit: str) -> Iterator[pathlib.Path]:
    """Gives a folder with the files of a commit, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="tessera-commit-") as place:
        archive = subprocess.run(["git", "-C", ROOT, "archive", commit], capture_output=True)
        if archive.returncode:
            said = archive.stderr.decode().strip().partition("\n")[0]
            raise UserError(f"--before = {commit!r} is no commit of this checkout: {said}.")
        subprocess.run(["tar", "-x", "-C", place], input=archive.stdout, check=True)
        yield pathlib.Path(place)


def _step_ratios(row: str, before: pathlib.Path, rounds: int) -> list[float]:
    """Returns, for each turn, the seconds before over the seconds now."""
    name, *rest = STEPS[row]
    with contextlib.ExitStack() as stack:
        asks = [stack.enter_context(worker([_module(root, name), *map(str, rest)], root)) for root in (ROOT, before)]
        turns = [[ask(3) for ask in asks] for _ in range(rounds + 1)][1:]
    return [then / now for now, then in turns]


def _module(root: pathlib.Path, name: str) -> str:
    """Returns the module of a side, which older commits have under another name."""
    older = root / "research" / "recipes" / f"bench_{name}.py"
    return f"research.recipes.bench_{name}" if older.exists() else f"research.bench.{name}"


def _bench_ratios(row: str, before: pathlib.Path, rounds: int) -> list[float]:
    """Returns, for each turn, the figures now over the figures before."""
    ratios = []
    for _ in range(rounds):
        now, then = (_figure(row, root) for root in (ROOT, before))
        ratios.append(now / then)
    return ratios


def _figure(row: str, root: pathlib.Path) -> float:
    """Returns the figure that a bench of a checkout prints; the mean where it prints several."""
    arguments, pattern = BENCHES[row]
    command: Sequence[str] = [sys.executable, "-m", "research", "bench", *arguments]
    printed = subprocess.run(command, cwd=root, check=True, stdout=subprocess.PIPE, text=True).stdout
    return statistics.mean(float(figure.replace(",", "")) for figure in re.findall(pattern, printed))

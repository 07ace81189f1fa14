"""This checkout beside an earlier commit of it: the same steps and kernels, interleaved on the same
machine.
"""

import argparse
import contextlib
import functools
import itertools
import pathlib
import re
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator

import research
from research.bench import convert, report
from research.bench.attention import CPU_SHAPES
from research.bench.sides import interleave_calls, run, worker
from research.core.errors import UserError, nearest

ROOT = pathlib.Path(research.__file__).parent.parent
# Steps and kernels that are called in a round.
CALLS = 3
FAMILIES = ("gpt2", "gemma", "mixtral", "deepseek", "t5", "bert")
# Sides that serve rounds, by the name of their row: a module of `research.bench`, and its
# arguments.
STEPS = {
    "train": ("train_sides", "tessera", "float32"),
    **{
        f"attention {'x'.join(map(str, s))}": ("attention_sides", "tessera", "float32", *s)
        for s in CPU_SHAPES
    },
    **{f"family {name}": ("families_side", name, "float32") for name in FAMILIES},
}
# A whole bench, and what its figure looks like in what it prints.
LOADER, LOADER_FIGURE = ("loader", "--rounds=3"), r"loader +([\d.]+) .*core-second"
# Of the folder that is converted, and of all that is made of it: a source, a workdir, and the way
# back.
CONVERTED = 500 * 10**6
# Files in memory, where the system has them.
MEMORY = pathlib.Path("/dev/shm")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this bench."""
    parser.add_argument(
        "--before",
        required=True,
        metavar="COMMIT",
        help="the commit to measure this checkout against",
    )
    parser.add_argument(
        "--only", help="rows, separated by commas, or beginnings of their names: train,attention"
    )
    report.add_arguments(parser, rounds=5)


def main(arguments: argparse.Namespace) -> None:
    """Measures both checkouts interleaved, and prints the ratios of their speeds."""
    report.check_arguments(arguments)
    rows = _rows(arguments.only)
    with _checkout(arguments.before) as before:
        found = (_measure(row, {"now": ROOT, "before": before}, arguments.rounds) for row in rows)
        report.publish("commits", arguments, itertools.chain.from_iterable(found))


def _rows(only: str | None) -> list[str]:
    known = [*STEPS, "loader", "convert"]
    if only is None:
        return known
    wanted = []
    for name in only.split(","):
        found = [row for row in known if row.startswith(name)]
        if not found:
            raise UserError("--only", name, f"is the beginning of no row. {nearest(name, known)}")
        wanted += found
    return wanted


@contextlib.contextmanager
def _checkout(commit: str) -> Iterator[pathlib.Path]:
    """Gives a folder with the files of a commit, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="tessera-commit-") as place:
        archive = subprocess.run(["git", "-C", ROOT, "archive", commit], capture_output=True)
        if archive.returncode:
            said = archive.stderr.decode().strip().partition("\n")[0]
            raise UserError("--before", commit, f"is no commit of this checkout: {said}.")
        subprocess.run(["tar", "-x", "-C", place], input=archive.stdout, check=True)
        yield pathlib.Path(place)


def _measure(
    row: str, roots: dict[str, pathlib.Path], rounds: int
) -> Iterator[tuple[str, report.Figure]]:
    """Yields the figures of a row; `roots` are the checkouts by their sides."""
    if row == "loader":
        rates = interleave_calls(
            {side: functools.partial(_loader_rate, root) for side, root in roots.items()}, rounds
        )
        yield row, report.Figure("M tokens/core-second", True, rates)
    elif row == "convert":
        yield from _conversions(roots, rounds)
    else:
        name, *rest = STEPS[row]
        with contextlib.ExitStack() as stack:
            sides = {}
            for side, root in roots.items():
                ask = stack.enter_context(worker([_module(root, name), *map(str, rest)], root))
                sides[side] = functools.partial(ask, CALLS)
            seconds = interleave_calls(sides, rounds)
        times = {
            side: [1000 * taken / CALLS for taken in values] for side, values in seconds.items()
        }
        yield row, report.Figure("ms", False, times)


def _module(root: pathlib.Path, name: str) -> str:
    """Returns the module of a side, which older commits have under another name."""
    older = root / "research" / "recipes" / f"bench_{name}.py"
    return f"research.recipes.bench_{name}" if older.exists() else f"research.bench.{name}"


def _loader_rate(root: pathlib.Path) -> float:
    """Returns what the loader's bench of a checkout prints, the mean of several shapes."""
    printed = run(["research", "bench", *LOADER], root)
    return statistics.mean(float(figure) for figure in re.findall(LOADER_FIGURE, printed))


def _conversions(
    roots: dict[str, pathlib.Path], rounds: int
) -> Iterator[tuple[str, report.Figure]]:
    """Yields a conversion in and one out: of files in memory where there is room, so that no disk
    is measured.
    """
    room = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4 * CONVERTED
    with tempfile.TemporaryDirectory(
        prefix="tessera-commits-", dir=MEMORY if room else None
    ) as place:
        folder = pathlib.Path(place)
        size = convert.make_folder(folder / "source", CONVERTED, "float32")
        sides = {
            side: functools.partial(_there_and_back, folder, root) for side, root in roots.items()
        }
        rounds_of = interleave_calls(sides, rounds)
    for way in ("in", "out"):
        rates = {
            side: [size / 1e6 / each[way] for each in answers]
            for side, answers in rounds_of.items()
        }
        note = "files in memory" if room else "files on the disk"
        yield f"convert {way}", report.Figure("MB/s", True, rates, note=note)


def _there_and_back(folder: pathlib.Path, root: pathlib.Path) -> dict[str, float]:
    module = _module(root, "convert_sides")
    return {way: convert.run_side(folder, way, module, root)["seconds"] for way in ("in", "out")}

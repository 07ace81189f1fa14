"""This checkout beside an earlier commit of it: the same steps and kernels, interleaved."""

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
from research.bench.kernels import SMALL
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
    **{
        f"kernel {name}": ("kernels_sides", "time", name, "tessera", "float32", *sizes.values())
        for name, sizes in SMALL.items()
    },
    **{f"family {name}": ("families_side", name, "float32") for name in FAMILIES},
}
# The loader's own bench, and its figure in what that prints.
LOADER = ("loader", "--rounds=3")
LOADER_FIGURE = r"loader +([\d.]+) .*core-second"
# Bytes of the folder that is converted: to a workdir, and back to a folder.
CONVERTED = 500 * 10**6
# A file system in memory, where there is one.
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

    # `train,attention` -> train and each row whose name begins with attention.
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
    with tempfile.TemporaryDirectory(prefix="tessera-commit-") as folder:
        # The files of the commit alone: this checkout and its index stay as they are.
        archive = subprocess.run(["git", "-C", ROOT, "archive", commit], capture_output=True)
        if archive.returncode:
            said = archive.stderr.decode().strip().partition("\n")[0]
            raise UserError("--before", commit, f"is no commit of this checkout: {said}.")
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        yield pathlib.Path(folder)


def _measure(
    row: str, roots: dict[str, pathlib.Path], rounds: int
) -> Iterator[tuple[str, report.Figure]]:
    """Yields the figures of a row; `roots` are the checkouts by their sides."""
    if row == "loader":
        sides = {side: functools.partial(_loader_rate, root) for side, root in roots.items()}
        rates = interleave_calls(sides, rounds)
        yield row, report.Figure("M tokens/core-second", True, rates)
    elif row == "convert":
        yield from _conversions(roots, rounds)
    else:
        yield row, _step_times(row, roots, rounds)


def _step_times(row: str, roots: dict[str, pathlib.Path], rounds: int) -> report.Figure:
    # A process of each checkout, with the same module and arguments.
    name, *sizes = STEPS[row]
    flags = [str(size) for size in sizes]
    with contextlib.ExitStack() as stack:
        sides = {}
        for side, root in roots.items():
            ask = stack.enter_context(worker([_module(root, name), *flags], root))
            sides[side] = functools.partial(ask, CALLS)
        seconds = interleave_calls(sides, rounds)
    times = {side: report.milliseconds(values, CALLS) for side, values in seconds.items()}
    return report.Figure("ms", False, times)


def _module(root: pathlib.Path, name: str) -> str:
    """Returns the module of a side, which older commits have under another name."""
    older = root / "research" / "recipes" / f"bench_{name}.py"
    return f"research.recipes.bench_{name}" if older.exists() else f"research.bench.{name}"


def _loader_rate(root: pathlib.Path) -> float:
    """Returns what the loader's bench of a checkout prints, the mean of several shapes."""
    printed = run(["research", "bench", *LOADER], root)
    figures = [float(figure) for figure in re.findall(LOADER_FIGURE, printed)]
    return statistics.mean(figures)


def _conversions(
    roots: dict[str, pathlib.Path], rounds: int
) -> Iterator[tuple[str, report.Figure]]:
    """Yields a conversion in and one out: of files in memory where there is room, so that no disk
    is measured.
    """
    # A folder, the workdir made of it (float32), and the folder made of that.
    in_memory = MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 4 * CONVERTED
    parent = MEMORY if in_memory else None
    with tempfile.TemporaryDirectory(prefix="tessera-commits-", dir=parent) as path:
        folder = pathlib.Path(path)
        size = convert.make_folder(folder / "source", CONVERTED, "float32")
        sides = {side: functools.partial(_round_trip, folder, root) for side, root in roots.items()}
        results = interleave_calls(sides, rounds)

    note = "files in memory" if in_memory else "files on the disk"
    for way in ("in", "out"):
        rates = {}
        for side, seconds in results.items():
            rates[side] = [size / 1e6 / each[way] for each in seconds]
        yield f"convert {way}", report.Figure("MB/s", True, rates, note=note)


def _round_trip(folder: pathlib.Path, root: pathlib.Path) -> dict[str, float]:
    module = _module(root, "convert_sides")
    # The way out reads the workdir that the way in has made.
    seconds = {}
    for way in ("in", "out"):
        seconds[way] = convert.run_side(folder, way, module, root)["seconds"]
    return seconds

"""What benches write and documents show: one form of file, a table of it, and the blocks of
Markdown that hold tables.

`python -m research.bench.report FILE.md…` writes into each block of these files, between `<!--
figures: NAME -->` and `<!-- end of figures -->`, the table of `docs/figures/NAME.json`.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import math
import pathlib
import re
import shlex
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import research
from research.bench import machine
from research.core.errors import UserError, within
from research.storage.files import write_bytes, write_text
from research.storage.json_files import read_object

FIGURES = pathlib.Path(research.__file__).parent.parent / "docs" / "figures"
# The text of a block whose file nobody has written yet.
UNMEASURED = "unmeasured"
BLOCK = re.compile(
    r"^(<!-- figures: ([\w-]+) -->\n)(.*?)^(<!-- end of figures -->)", re.DOTALL | re.MULTILINE
)
MARK = re.compile(r"^<!-- (figures: |end of figures)", re.MULTILINE)
COLUMNS = ["what", "beside", "ratio", "lowest to highest", "ours", "theirs", "also"]


@dataclasses.dataclass(frozen=True)
class Figure:
    """A row of a bench: what was measured of one thing.

    Attributes:
      unit: of the values.
      is_rate: whether more is better, as of tokens a second; of times and cycles less is.
      rounds: the values of each side, one a round; this project's side is the first.
      skipped: sides that were not measured, and why.
      note: what else was found.
    """

    unit: str
    is_rate: bool
    rounds: Mapping[str, Sequence[int | float]]
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""

    def ratios(self) -> dict[str, list[float]]:
        """Returns, for each peer, our speed over its own, round by round."""
        # Of rates ours / theirs, of times theirs / ours.
        ours, *peers = self.rounds
        ratios = {}
        for peer in peers:
            pairs = zip(self.rounds[ours], self.rounds[peer], strict=True)
            if self.is_rate:
                ratios[peer] = [us / them for us, them in pairs]
            else:
                ratios[peer] = [them / us for us, them in pairs]
        return ratios


def sizes_text(sizes: Mapping[str, int]) -> str:
    """Returns sizes as `width 512, experts 8`."""
    parts = [f"{name} {size:,}" for name, size in sizes.items()]
    return ", ".join(parts)


def milliseconds(seconds: Sequence[float], calls: int) -> list[float]:
    """Returns the milliseconds a call, of the seconds of each round."""
    return [1000 * each / calls for each in seconds]


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds the flags that every bench has; `rounds` is their default."""
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"rounds of each side (default {rounds})"
    )
    parser.add_argument("--json", metavar="FILE", help="where to write the figures of every round")


def check_arguments(arguments: argparse.Namespace, *counts: str) -> None:
    """Raises UserError for rounds and other counts below 1, and for a file that could not be
    written after all rounds.
    """
    for name in ("rounds", *counts):
        value = vars(arguments)[name]
        if value < 1:
            raise UserError(f"--{name}", value, "must be at least 1.")

    # The figures of a long bench must not be lost at its end.
    if arguments.json is not None:
        path = pathlib.Path(arguments.json).resolve()
        if not path.parent.is_dir():
            raise UserError("--json", arguments.json, "is in a folder that does not exist.")
        if path.exists() and not path.is_file():
            raise UserError("--json", arguments.json, "is not a file.")
        # Written and restored: permissions alone do not tell.
        with _write_error("--json", arguments.json):
            if path.exists():
                write_bytes(path, path.read_bytes())
            else:
                write_bytes(path, b"")
                path.unlink()


def publish(bench: str, arguments: argparse.Namespace, rows: Iterable[tuple[str, Figure]]) -> None:
    """Prints the named figures of a bench as they come, and writes all of them to the file of
    `--json`.
    """
    # Rows are measured while they are printed, so that a long bench shows how far it is.
    figures = {}
    for name, figure in rows:
        _print(name, figure)
        figures[name] = dataclasses.asdict(figure)
    if arguments.json is not None:
        command = shlex.join(["tessera", "bench", bench, *_flags(arguments)])
        write(pathlib.Path(arguments.json), command, figures=figures)


def _flags(arguments: argparse.Namespace) -> list[str]:
    """Returns the flags that repeat a bench: rounds = 3 and full = True are --rounds=3 --full."""
    flags = []
    for name, value in vars(arguments).items():
        if value and name not in ("bench", "overrides", "json"):
            flag = f"--{name}" if value is True else f"--{name}={value}"
            flags.append(flag)
    return flags


def _print(name: str, figure: Figure) -> None:
    print(name)
    for side, values in figure.rounds.items():
        print(f"  {side:12} {spread(values)} {figure.unit}")
    # Peers that were not measured, and how many times faster we are than the others.
    for side, reason in figure.skipped.items():
        print(f"  {side:12} left out: {reason}")
    for peer, ratios in figure.ratios().items():
        print(f"  {spread(ratios)} times the speed of {peer}, round by round")
    if figure.note:
        print(f"  {figure.note}")
    sys.stdout.flush()


def write(path: pathlib.Path, command: str, **content: Any) -> None:
    """Writes the results of a command with the command itself, the date and the machine."""
    report = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine.describe(),
        **content,
    }
    text = json.dumps(report, indent=1, ensure_ascii=False)
    with _write_error("--json", str(path)):
        write_text(path, text + "\n")


@contextlib.contextmanager
def _write_error(name: str, value: str) -> Iterator[None]:
    """Turns the failure to write a file into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(name, value, f"cannot be written: {error.strerror}.") from error


def table(report: Mapping[str, Any]) -> str:
    """Returns a report as Markdown: the command that made it, and its rows.

    Those of a bench are ratios with their spread and medians of both sides; another command gives
    `columns` and `rows`.
    """
    where = machine.sentence(report["machine"])
    # The command, the date and the machine stand above the table.
    lines = [f"`{report['command']}`, {report['date']}, {where}.", ""]
    # A bench has figures, another command its own columns.
    columns = COLUMNS
    if "figures" in report:
        rows = _figure_rows(report["figures"])
    else:
        columns = report["columns"]
        rows = report["rows"]

    for row in (columns, ["---"] * len(columns), *rows):
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells, not {len(columns)}")
        cells = [_cell(text) for text in row]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Returns text on one line, which ends neither its column nor the block."""
    return " ".join(text.split()).replace("|", "\\|").replace("<!--", "&lt;!--")


def _figure_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    rows = []
    for name, fields in figures.items():
        figure = Figure(**fields)
        if not isinstance(figure.is_rate, bool):
            raise ValueError("is_rate is true or false")
        rows += _rows(name, figure)
    return rows


def _rows(name: str, figure: Figure) -> list[list[str]]:
    """Returns a row of COLUMNS for each peer."""
    # Medians with their unit, as "30.6 ms".
    medians = {}
    for side, values in figure.rounds.items():
        medians[side] = f"{digits(statistics.median(values))} {figure.unit}"
    ours, *_ = medians.values()  # this project's side is the first

    rows = []
    for peer, ratios in figure.ratios().items():
        median = digits(statistics.median(ratios))
        extremes = ""
        if len(ratios) > 1:
            extremes = f"{_extremes(ratios)}, {len(ratios)} rounds"
        rows.append([name, peer, median, extremes, ours, medians[peer], figure.note])
    for peer, reason in figure.skipped.items():
        rows.append([name, peer, "left out", reason, ours, "", figure.note])
    return rows


def spread(values: Sequence[int | float]) -> str:
    """Returns the median, with the lowest and highest value where there are several."""
    median = digits(statistics.median(values))
    if len(values) == 1:
        return median
    return f"{median} ({_extremes(values)})"


def _extremes(values: Sequence[int | float]) -> str:
    lowest = digits(min(values))
    highest = digits(max(values))
    return f"{lowest} to {highest}"


def digits(value: int | float) -> str:
    """Returns a number with three significant digits, or all digits before the point."""
    # 0.0207 has its first digit at 10^-2, and so 4 places; 712,551 has none.
    places = 0
    if value:
        places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{places}f}"


def filled(text: str, folder: pathlib.Path) -> str:
    """Returns the text of a Markdown file with the tables of a folder's files in its blocks."""
    # Each block has two marks.
    if 2 * len(BLOCK.findall(text)) != len(MARK.findall(text)):
        raise UserError("has a block of figures without its beginning or end.")

    def fill(block: re.Match[str]) -> str:
        begin, name, _, end = block.groups()
        return begin + _content(folder / f"{name}.json") + end

    return BLOCK.sub(fill, text)


def check(text: str, folder: pathlib.Path) -> list[str]:
    """Returns the names of the blocks whose content is not the table of their file."""
    blocks = BLOCK.finditer(text)
    filled_blocks = BLOCK.finditer(filled(text, folder))
    pairs = zip(blocks, filled_blocks, strict=True)
    return [found[2] for found, wanted in pairs if found[3] != wanted[3]]


def _content(path: pathlib.Path) -> str:
    if not path.exists():
        return f"{UNMEASURED}\n"
    try:
        return table(read_object(path))
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"is not a file of figures: {error!r}.", origin=str(path)) from error


def main(paths: Sequence[str]) -> int:
    """Fills the blocks of Markdown files, and returns the exit status."""
    try:
        if not paths:
            raise UserError("name the Markdown files whose blocks are to be filled.")
        for path in map(pathlib.Path, paths):
            if not path.is_file():
                raise UserError("is not a file.", origin=str(path))
            with within("", str(path)):
                try:
                    write_text(path, filled(path.read_text(encoding="utf-8"), FIGURES))
                except (OSError, UnicodeDecodeError) as error:
                    raise UserError(f"cannot be read and written: {error}.") from error
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

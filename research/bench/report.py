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
# What a block says whose file nobody has written yet.
UNMEASURED = "unmeasured"
BLOCK = re.compile(
    r"^(<!-- figures: ([\w-]+) -->\n)(.*?)^(<!-- end of figures -->)", re.DOTALL | re.MULTILINE
)
MARK = re.compile(r"^<!-- (figures: |end of figures)", re.MULTILINE)
COLUMNS = ["what", "beside", "ratio", "lowest to highest", "ours", "theirs", "also"]


@dataclasses.dataclass(frozen=True)
class Figure:
    """What was measured of one thing: a row of a bench.

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
        """Returns, of each peer, our speed over its own, round by round."""
        ours, *peers = self.rounds
        found = {}
        for peer in peers:
            pairs = zip(self.rounds[ours], self.rounds[peer], strict=True)
            found[peer] = [us / them if self.is_rate else them / us for us, them in pairs]
        return found


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """Adds the flags that every bench has, and how many rounds it takes by default."""
    parser.add_argument(
        "--rounds", type=int, default=rounds, help=f"rounds of each side (default {rounds})"
    )
    parser.add_argument("--json", metavar="FILE", help="where to write the figures of every round")


def check_arguments(arguments: argparse.Namespace, *counts: str) -> None:
    """Refuses rounds and other counts below 1, and a file that could not be written after all
    rounds.
    """
    for name in ("rounds", *counts):
        value = vars(arguments)[name]
        if value < 1:
            raise UserError(f"--{name}", value, "must be at least 1.")
    if arguments.json:
        path = pathlib.Path(arguments.json).resolve()
        if not path.parent.is_dir():
            raise UserError("--json", arguments.json, "lies in no folder that is there.")
        if path.exists() and not path.is_file():
            raise UserError("--json", arguments.json, "is no file.")
        with _told("--json", arguments.json):
            if path.exists():
                write_bytes(path, path.read_bytes())
            else:
                write_bytes(path, b"")
                path.unlink()


def publish(bench: str, arguments: argparse.Namespace, rows: Iterable[tuple[str, Figure]]) -> None:
    """Prints the named figures of a bench as they come, and writes all of them where its `--json`
    says so.
    """
    figures = {}
    for name, figure in rows:
        _print(name, figure)
        figures[name] = dataclasses.asdict(figure)
    if arguments.json:
        flags = {
            name: value
            for name, value in vars(arguments).items()
            if name not in ("bench", "overrides", "json")
        }
        given = [
            f"--{name}" if value is True else f"--{name}={value}"
            for name, value in flags.items()
            if value
        ]
        write(
            pathlib.Path(arguments.json),
            shlex.join(["tessera", "bench", bench, *given]),
            figures=figures,
        )


def _print(name: str, figure: Figure) -> None:
    print(name)
    for side, values in figure.rounds.items():
        print(f"  {side:12} {spread(values)} {figure.unit}")
    for side, reason in figure.skipped.items():
        print(f"  {side:12} left out: {reason}")
    for peer, ratios in figure.ratios().items():
        print(f"  {spread(ratios)} times the speed of {peer}, round by round")
    if figure.note:
        print(f"  {figure.note}")
    sys.stdout.flush()


def write(path: pathlib.Path, command: str, **content: Any) -> None:
    """Writes what a command has found, beside the command itself, the date and the machine."""
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    report = {"command": command, "date": date, "machine": machine.describe(), **content}
    with _told("--json", str(path)):
        write_text(path, json.dumps(report, indent=1, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def _told(name: str, value: str) -> Iterator[None]:
    """Turns a file that cannot be written into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(name, value, f"cannot be written: {error.strerror}.") from error


def table(report: Mapping[str, Any]) -> str:
    """Returns a report as Markdown: what made it, and its rows.

    Those of a bench are ratios with their spread and medians of both sides; another command gives
    `columns` and `rows`.
    """
    lines = [f"`{report['command']}`, {report['date']}, {machine.sentence(report['machine'])}.", ""]
    if "figures" in report:
        figures = {name: Figure(**fields) for name, fields in report["figures"].items()}
        if not all(isinstance(figure.is_rate, bool) for figure in figures.values()):
            raise ValueError("is_rate is true or false")
        columns, rows = (
            COLUMNS,
            [row for name, figure in figures.items() for row in _rows(name, figure)],
        )
    else:
        columns, rows = report["columns"], report["rows"]
    for row in (columns, ["---"] * len(columns), *rows):
        if len(row) != len(columns):
            raise ValueError(f"a row of {len(row)} cells, not {len(columns)}")
        # A cell is one line, and ends neither its column nor the block.
        cells = [
            " ".join(cell.split()).replace("|", "\\|").replace("<!--", "&lt;!--") for cell in row
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rows(name: str, figure: Figure) -> list[list[str]]:
    medians = {
        side: f"{digits(statistics.median(values))} {figure.unit}"
        for side, values in figure.rounds.items()
    }
    ours, *_ = figure.rounds
    rows = []
    for peer, ratios in figure.ratios().items():
        ends = (
            f"{digits(min(ratios))} to {digits(max(ratios))}, {len(ratios)} rounds"
            if len(ratios) > 1
            else ""
        )
        rows.append(
            [
                name,
                peer,
                digits(statistics.median(ratios)),
                ends,
                medians[ours],
                medians[peer],
                figure.note,
            ]
        )
    for peer, reason in figure.skipped.items():
        rows.append([name, peer, "left out", reason, medians[ours], "", figure.note])
    return rows


def spread(values: Sequence[int | float]) -> str:
    """Returns the median, with the lowest and highest value where there are several."""
    median = digits(statistics.median(values))
    return (
        f"{median} ({digits(min(values))} to {digits(max(values))})" if len(values) > 1 else median
    )


def digits(value: int | float) -> str:
    """Returns a number with three digits that count, or all of its whole ones."""
    places = max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:,.{places}f}"


def filled(text: str, folder: pathlib.Path) -> str:
    """Returns the text of a Markdown file whose blocks hold what the files of a folder say."""
    if 2 * len(BLOCK.findall(text)) != len(MARK.findall(text)):
        raise UserError("has a block of figures without its beginning or end.")
    return BLOCK.sub(
        lambda block: block[1] + _content(folder / f"{block[2]}.json") + block[4], text
    )


def check(text: str, folder: pathlib.Path) -> list[str]:
    """Returns the names of the blocks that hold anything else than the files say."""
    pairs = zip(BLOCK.finditer(text), BLOCK.finditer(filled(text, folder)), strict=True)
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

"""How many cycles a TPU kernel is scheduled for: its scalar program is run, and each bundle is
counted as it is issued.

Compiled with `LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"`, the TPU
compiler writes the final
program of each kernel: one bundle of instructions a line, one bundle a cycle where nothing stalls.
All control flow is the scalar unit's (loops over the grid, predicated regions), and depends on
nothing but the iteration and the scalars that the kernel is handed beforehand. So the scalar
instructions are executed here, exactly, and the vector and matrix instructions beside them only
counted. Waits for memory are not in a schedule, and so not in these counts.
"""

import dataclasses
import glob
import itertools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from research.bench.scalar_program import Machine, translate

_PROGRAM, _USE = "-final_bundles.txt", "-final_hlo-static-per-bundle-utilization.txt"
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_REGION = re.compile(r"(Start/End empty|Start|End) region (\d+)")
_BUNDLE = re.compile(
    r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:[ >]*\{(.*?)\}((?:\s*@\w+@)*)",
    re.MULTILINE | re.DOTALL,
)
_MARK = re.compile(r"@(\w)(\d+)@")
_BRANCH = re.compile(r"sbr\.rel (?:\((!?)%\w+_p(\d+)\) )?target = \$region(\d+)")
# A branch around what only another core does has no mark at its end, and is not taken by the first.
_NOWHERE = -1
# No branch of a known chip waits longer before it is taken.
_MAX_DELAY = 8


@dataclasses.dataclass(frozen=True)
class InstructionSchedule:
    """A kernel's program as it ran.

    Attributes:
      name: the kernel's.
      counts: how often each bundle was issued.
      used: instructions of each bundle on each unit.
      slots: instructions that each unit takes a cycle.
    """

    name: str
    counts: Int[np.ndarray, " bundles"]
    used: Mapping[str, Int[np.ndarray, " bundles"]]
    slots: Mapping[str, int]

    @property
    def cycles(self) -> int:
        """Bundles issued over the whole run."""
        return int(self.counts.sum())

    def busy(self, unit: str) -> float:
        """Returns the share of a unit's slots that are taken, over the whole run."""
        return float((self.counts * self.used[unit]).sum() / (self.cycles * self.slots[unit]))

    def steady(self, unit: str) -> float:
        """Returns the share of a unit's slots that are taken in the stretch that takes the most
        cycles.
        """
        first, length, _ = max(self.regions(), key=lambda region: region[1] * region[2])
        return float(self.used[unit][first : first + length].sum() / (length * self.slots[unit]))

    def regions(self) -> list[tuple[int, int, int]]:
        """Returns (first bundle, bundles, times) of each stretch that is issued equally often, in
        program order.
        """
        edges = [0, *(np.flatnonzero(np.diff(self.counts)) + 1).tolist(), len(self.counts)]
        return [(a, b - a, int(self.counts[a])) for a, b in itertools.pairwise(edges)]


def kernel_programs(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the final program of each kernel in a dump, by the kernel's name; the last one where
    names repeat.
    """
    found = {}
    for path in sorted(folder.glob(f"*{_PROGRAM}")):
        name = re.sub(r"^\d+-|-\d+$", "", path.name.removesuffix(_PROGRAM))
        if not name.endswith("schedule-analysis"):
            found[name] = path
    return found


def run_program(
    program: pathlib.Path, operands: Sequence[Shaped[np.ndarray, "..."] | None] = ()
) -> InstructionSchedule:
    """Runs the scalar part of a program.

    Args:
      program: `*-final_bundles.txt` of a dump; the utilization file of the same kernel stands
          beside it.
      operands: of the kernel, in their order; needed where control depends on them, as on scalars
          that are prefetched.

    Raises:
      ValueError: the control flow depends on something unknown: an operand that is not given, or a
          vector.
    """
    bundles, starts, ends = _parse(program.read_text())
    delay = _branch_delay(bundles, ends)
    counts = _execute(bundles, starts, delay, Machine(operands))
    used, slots = _utilization(program, len(bundles))
    name = re.sub(r"^\d+-|-\d+$", "", program.name.removesuffix(_PROGRAM))
    return InstructionSchedule(name, counts, used, slots)


def _parse(text: str) -> tuple[list[list[str]], dict[str, int], list[set[str]]]:
    """Returns the instructions of each bundle, the bundle where each region starts, and the regions
    that each ends.
    """

    def mark(comment: re.Match[str]) -> str:
        kinds = {"Start": "S", "End": "E", "Start/End empty": "S"}
        return "".join(
            f"@{kinds[kind]}{region}@" for kind, region in _REGION.findall(comment.group(0))
        )

    text = re.sub(r"shape index: \{[^}]*\}", "", text)
    text = _COMMENT.sub(mark, text.partition("control target key end")[2])
    bundles: list[list[str]] = []
    starts: dict[str, int] = {}
    ends: list[set[str]] = []
    for match in _BUNDLE.finditer(text):
        assert int(match.group(1), 16) == len(bundles), f"bundle {len(bundles)} is missing"
        marks = _MARK.findall(match.group(2) + match.group(3))
        starts |= {
            region: len(bundles) for kind, region in marks if kind == "S" and region not in starts
        }
        ends.append({region for kind, region in marks if kind == "E"})
        instructions = _MARK.sub("", match.group(2)).split(";;")
        bundles.append([instruction.strip() for instruction in instructions if instruction.strip()])
    return bundles, starts, ends


def _branch_delay(bundles: list[list[str]], ends: list[set[str]]) -> int:
    """Returns how many bundles after a branch are still issued: every branch's region ends with the
    last of them.
    """
    branches = [i for i, bundle in enumerate(bundles) if any(_BRANCH.search(one) for one in bundle)]
    fits = [
        d for d in range(1, _MAX_DELAY) if all(i + d < len(ends) and ends[i + d] for i in branches)
    ]
    assert len(fits) == 1 or not branches, f"branches end their regions {fits} bundles later"
    return fits[0] if branches else 0


def _execute(
    bundles: list[list[str]], starts: dict[str, int], delay: int, machine: Machine
) -> Int[np.ndarray, " bundles"]:
    """Returns how often each bundle is issued."""
    branches = {}
    for i, bundle in enumerate(bundles):
        for match in filter(None, map(_BRANCH.search, bundle)):
            branches[i] = (match.group(1), match.group(2), starts.get(match.group(3), _NOWHERE))
    leaders = {
        0,
        len(bundles),
        *(to for *_, to in branches.values() if to != _NOWHERE),
        *(i + delay + 1 for i in branches),
    }
    edges = sorted(leaders)
    blocks: dict[int, tuple[int, Callable[[Machine], int | None]]] = {}
    for start, stop in itertools.pairwise(edges):
        taken = {i: branches[i] for i in range(start, stop) if i in branches}
        blocks[start] = (
            stop,
            translate(bundles[start:stop], {i - start: branch for i, branch in taken.items()}),
        )
    visits = dict.fromkeys(blocks, 0)
    at = 0
    while at < len(bundles):
        visits[at] += 1
        stop, block = blocks[at]
        target = block(machine)
        at = stop if target is None else target
        assert at != _NOWHERE, "a branch leads to a region without a mark"
    counts = np.zeros(len(bundles), np.int64)
    for start, (stop, _) in blocks.items():
        counts[start:stop] = visits[start]
    return counts


def _utilization(program: pathlib.Path, bundles: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the instructions of each bundle on each unit, and each unit's slots."""
    name = re.sub(r"-\d+$", "", program.name.removesuffix(_PROGRAM))
    (path,) = program.parent.glob(f"{glob.escape(name)}-*{_USE}")
    lines = path.read_text().splitlines()
    units = [unit.strip() for unit in lines[1].split(",")]
    slots = [int(count) for count in lines[2].split()]
    rows = np.array([[int(used) for used in line.split()] for line in lines[4:] if line.strip()])
    assert len(rows) == bundles, f"{path.name} has {len(rows)} bundles, not {bundles}"
    return dict(zip(units, rows.T, strict=True)), dict(zip(units, slots, strict=True))

"""The instruction schedule of a TPU kernel: its scalar program is run, and the bundles that it
issues are counted as cycles.

Compiled with `LIBTPU_INIT_ARGS="--xla_jf_dump_to=DIR --xla_jf_dump_llo_text=true"`, the TPU
compiler writes the final program of each kernel: one bundle of instructions a line, one bundle a
cycle where nothing stalls. The scalar unit has all control flow (loops over the grid, predicated
regions), which depends only on the iteration and on scalars that the kernel prefetches. So scalar
instructions are executed here, exactly; vector and matrix instructions are only counted. A schedule
does not include waits for memory, so neither do these counts.
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

# Endings of the files of a dump.
_PROGRAM = "-final_bundles.txt"
_UTILIZATION = "-final_hlo-static-per-bundle-utilization.txt"
# What a bundle line has: regions in comments, instructions in braces, and branches among them.
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_REGION = re.compile(r"(Start/End empty|Start|End) region (\d+)")
_BUNDLE = re.compile(
    r"^\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:[ >]*\{(.*?)\}((?:\s*@\w+@)*)",
    re.MULTILINE | re.DOTALL,
)
_MARK = re.compile(r"@(\w)(\d+)@")
_BRANCH = re.compile(r"sbr\.rel (?:\((!?)%\w+_p(\d+)\) )?target = \$region(\d+)")
# The target of a branch around what only another core does: its end has no mark, and the first core
# never takes it.
_NOWHERE = -1
# Bundles that are still issued after a branch: fewer than this on every known chip.
_MAX_DELAY = 8

# A branch: `!` where it is taken if its predicate is false, the predicate's register (None where it
# is always taken), and the bundle that it leads to.
Branch = tuple[str, str | None, int]


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

    def utilization(self, unit: str) -> float:
        """Returns the fraction of a unit's slots that are used, over the whole run."""
        used_by_bundle = self.counts * self.used[unit]
        used = used_by_bundle.sum()
        available = self.cycles * self.slots[unit]
        return float(used / available)

    def main_loop_utilization(self, unit: str) -> float:
        """Returns the fraction of a unit's slots that are used in the region with the most
        cycles.
        """

        def cycles(region: tuple[int, int, int]) -> int:
            _, length, times = region
            return length * times

        first, length, _ = max(self.regions(), key=cycles)
        end = first + length
        used_by_bundle = self.used[unit][first:end]
        used = used_by_bundle.sum()
        available = length * self.slots[unit]
        return float(used / available)

    def regions(self) -> list[tuple[int, int, int]]:
        """Returns (first bundle, bundles, times) of each run of bundles that are issued equally
        often, in program order.
        """
        # counts [1, 1, 5, 5, 5, 1] -> edges [0, 2, 5, 6] -> (0, 2, 1), (2, 3, 5), (5, 1, 1)
        differences = np.diff(self.counts)
        changes = np.flatnonzero(differences) + 1
        edges = [0, *changes.tolist(), len(self.counts)]
        regions = []
        for first, end in itertools.pairwise(edges):
            length = end - first
            times = int(self.counts[first])
            regions.append((first, length, times))
        return regions


def kernel_programs(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the final program of each kernel in a dump, by the kernel's name; the last one where
    names repeat.
    """
    programs = {}
    for path in sorted(folder.glob(f"*{_PROGRAM}")):
        name = _kernel_name(path)
        if not name.endswith("schedule-analysis"):
            programs[name] = path
    return programs


def _kernel_name(program: pathlib.Path) -> str:
    """Returns `toy.1` of `17-toy.1-71-final_bundles.txt`."""
    name = program.name.removesuffix(_PROGRAM)
    return re.sub(r"^\d+-|-\d+$", "", name)


def run_program(
    program: pathlib.Path, operands: Sequence[Shaped[np.ndarray, "..."] | None] = ()
) -> InstructionSchedule:
    """Runs the scalar part of a program.

    Args:
      program: `*-final_bundles.txt` of a dump, beside the utilization file of the same kernel.
      operands: of the kernel, in their order; needed where control depends on them, as on scalars
          that are prefetched.

    Raises:
      ValueError: the control flow depends on something unknown: an operand that is not given, or a
          vector.
    """
    text = program.read_text()
    bundles, region_starts, region_ends = _parse(text)
    branches = _branches(bundles, region_starts)
    delay = _branch_delay(branches, region_ends)
    machine = Machine(operands)
    counts = _issue_counts(bundles, branches, delay, machine)
    used, slots = _utilization(program, len(bundles))
    name = _kernel_name(program)
    return InstructionSchedule(name, counts, used, slots)


def _parse(text: str) -> tuple[list[list[str]], dict[str, int], list[set[str]]]:
    """Returns the instructions of each bundle, the bundle where each region starts, and the regions
    that end at each bundle.
    """

    def mark(comment: re.Match[str]) -> str:
        # "/* Start region 3 */" -> "@S3@": a comment inside braces would end the bundle.
        letters = {"Start": "S", "End": "E", "Start/End empty": "S"}
        comment_text = comment.group(0)
        marks = ""
        for kind, region in _REGION.findall(comment_text):
            letter = letters[kind]
            marks += f"@{letter}{region}@"
        return marks

    # The braces of operand shapes, and of operands that are one array, would end a bundle, too.
    text = re.sub(r"(?:shape index|may-alias): \{[^}]*\}", "", text)
    _, _, text = text.partition("control target key end")
    text = _COMMENT.sub(mark, text)

    bundles: list[list[str]] = []
    starts: dict[str, int] = {}
    ends: list[set[str]] = []
    for match in _BUNDLE.finditer(text):
        address, content, trailing_marks = match.groups()
        assert int(address, 16) == len(bundles), f"bundle {len(bundles)} is missing"
        ended = set()
        # Regions start before the instructions of a bundle, and end after them.
        for kind, region in _MARK.findall(content + trailing_marks):
            if kind == "S":
                starts.setdefault(region, len(bundles))
            else:
                ended.add(region)
        ends.append(ended)

        # "%s1_s0 = … ;; %s2_s1 = smov 3" -> two instructions
        content = _MARK.sub("", content)
        instructions = []
        for instruction in content.split(";;"):
            instruction = instruction.strip()
            if instruction:
                instructions.append(instruction)
        bundles.append(instructions)
    return bundles, starts, ends


def _branch_delay(branches: dict[int, Branch], ends: list[set[str]]) -> int:
    """Returns how many bundles are still issued after a branch: the region of every branch ends
    with the last of them.
    """
    if not branches:
        return 0

    def fits(delay: int) -> bool:
        lasts = [i + delay for i in branches]
        if max(lasts) >= len(ends):
            return False
        return all(ends[last] for last in lasts)

    delays = [delay for delay in range(1, _MAX_DELAY) if fits(delay)]
    assert len(delays) == 1, f"branches end their regions {delays} bundles later"
    return delays[0]


def _branches(bundles: list[list[str]], region_starts: dict[str, int]) -> dict[int, Branch]:
    """Returns the branch of each bundle that has one."""
    branches = {}
    for i, bundle in enumerate(bundles):
        for instruction in bundle:
            match = _BRANCH.search(instruction)
            if match is None:
                continue
            negated, register, region = match.groups()
            target = region_starts.get(region, _NOWHERE)
            branches[i] = (negated, register, target)
    return branches


def _issue_counts(
    bundles: list[list[str]], branches: dict[int, Branch], delay: int, machine: Machine
) -> Int[np.ndarray, " bundles"]:
    """Runs the program and returns how often each bundle is issued."""
    blocks = _translate_blocks(bundles, branches, delay)

    # How often each block is entered.
    visits = dict.fromkeys(blocks, 0)
    start = 0
    while start < len(bundles):
        visits[start] += 1
        stop, block = blocks[start]
        target = block(machine)
        start = stop if target is None else target
        assert start != _NOWHERE, "a branch leads to a region without a mark"

    # Blocks {0: 1, 4: 5} of 4 and 2 bundles -> counts [1, 1, 1, 1, 5, 5]
    counts = np.zeros(len(bundles), np.int64)
    for start, (stop, _) in blocks.items():
        counts[start:stop] = visits[start]
    return counts


def _translate_blocks(
    bundles: list[list[str]], branches: dict[int, Branch], delay: int
) -> dict[int, tuple[int, Callable[[Machine], int | None]]]:
    """Returns the basic blocks: by the first bundle of each, the bundle behind it and its
    function.
    """
    # A block begins at the target of a branch, and behind the bundles that a branch still issues.
    targets = {target for *_, target in branches.values()} - {_NOWHERE}
    after_branches = {i + delay + 1 for i in branches}
    edges = sorted({0, len(bundles)} | targets | after_branches)

    blocks = {}
    for start, stop in itertools.pairwise(edges):
        inside = {}
        for i in range(start, stop):
            if i in branches:
                inside[i - start] = branches[i]
        function = translate(bundles[start:stop], inside)
        blocks[start] = (stop, function)
    return blocks


def _utilization(program: pathlib.Path, bundles: int) -> tuple[dict[str, Any], dict[str, int]]:
    """Returns the instructions of each bundle on each unit, and each unit's slots."""
    # `17-toy.1-71-final_bundles.txt` -> `17-toy.1`
    name = program.name.removesuffix(_PROGRAM)
    name = re.sub(r"-\d+$", "", name)
    name = glob.escape(name)
    (path,) = program.parent.glob(f"{name}-*{_UTILIZATION}")

    # A title, the units, their slots, a ruler, and the instructions of each bundle.
    _, units_line, slots_line, _, *rows = path.read_text().splitlines()
    units = [unit.strip() for unit in units_line.split(",")]
    slots = [int(count) for count in slots_line.split()]
    counts = []
    for row in rows:
        if row.strip():
            row_counts = [int(count) for count in row.split()]
            counts.append(row_counts)
    assert len(counts) == bundles, f"{path.name} has {len(counts)} bundles, not {bundles}"

    # [bundles, units] -> the column of each unit
    columns = np.array(counts).T
    used = dict(zip(units, columns, strict=True))
    slots_by_unit = dict(zip(units, slots, strict=True))
    return used, slots_by_unit

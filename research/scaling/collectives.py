"""The collectives of a compiled program: what each moves, along which mesh axes, how often."""

import dataclasses
from collections.abc import Iterable, Iterator

import numpy as np
from jaxtyping import Int

from research.parallel.mesh_config import SlicesConfig
from research.scaling.hlo import ArrayShape, Computation, Instruction, Module, parse_module
from research.scaling.loop_trips import trip_count
from research.scaling.overlap import SPREAD_START, computed_meanwhile
from research.scaling.replica_groups import (
    AnyMesh,
    axes_between,
    crosses_slices,
    parse_groups,
    slice_of_each,
)

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# What starts something that runs beside the instructions up to its `-done`.
_START = "-start"
# How a TPU program spreads a collective over fusions that compute: the first of them starts it, the
# others have copies of it.
_SPREAD = "async_collective_fusion_config"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange of a compiled program, as one device takes part in it.

    Attributes:
      kind: of `KINDS`.
      dtype: of its largest operand, as XLA spells it.
      operand_bytes: what a device gives.
      result_bytes: what it gets.
      shapes: of the results.
      group_size: devices that exchange with each other; 2 of a permute.
      axes: the mesh axes along which they lie apart.
      op_name: where in the traced function it comes from; empty where the compiler does not say.
      is_async: whether other instructions may run beside it.
      meanwhile: the names of those that compute while it runs.
      times: how often a run of the program has it. In a conditional, those of the branch that moves
        most are counted, and those of the others have 0.
      trips_known: whether all loops around it have a known number of turns; others count as one.
      crosses_slices: whether devices of several slices are in a group.
      aligns_scatter: whether it only brings rows to where they belong after a reduce-scatter that
        the TPU compiler padded.
      instruction: its name.
      computation: the name of the computation that has it.
    """

    kind: str
    dtype: str
    operand_bytes: int
    result_bytes: int
    shapes: tuple[ArrayShape, ...]
    group_size: int
    axes: tuple[str, ...]
    op_name: str
    is_async: bool
    meanwhile: tuple[str, ...]
    times: int
    trips_known: bool
    crosses_slices: bool
    aligns_scatter: bool
    instruction: str
    computation: str

    @property
    def wire_bytes(self) -> float:
        """Bytes that a device sends each time, by the formula of a ring of n devices.

        An all-gather sends (n − 1) / n of its result, a reduce-scatter and an all-to-all as much of
        their operand, an all-reduce twice that, and a permute its operand. Of a ragged all-to-all
        it is the most that it can send. What a device keeps is not sent.

        Source: Thakur et al. 2005, doi.org/10.1177/1094342005051521, sections 4.1 to 4.5.
        """
        if not self.axes:
            return 0.0
        others = (self.group_size - 1) / self.group_size
        if self.kind == "all-gather":
            return self.result_bytes * others
        if self.kind == "all-reduce":
            return 2 * self.operand_bytes * others
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.operand_bytes)
        return self.operand_bytes * others

    @property
    def volume(self) -> float:
        """Bytes that a device sends in a run of the program."""
        return self.times * self.wire_bytes


def collectives(
    text: str, mesh: AnyMesh, slices: SlicesConfig | None = None
) -> tuple[Collective, ...]:
    """Returns the collectives of a compiled program, in the order of its schedule.

    Args:
      text: of `compiled.as_text()`, of a CPU or TPU program.
      mesh: that it was compiled for.
      slices: of the mesh; None is one slice.
    """
    return read_collectives(parse_module(text), mesh, slices)


def read_collectives(
    module: Module, mesh: AnyMesh, slices: SlicesConfig | None = None
) -> tuple[Collective, ...]:
    """Returns the collectives of a program that is read already; as `collectives`."""
    reader = _Reader(module, mesh, slice_of_each(mesh, slices or SlicesConfig()))
    return tuple(reader.of_computation(module.computations[module.entry]))


def volume_by_axis(found: Iterable[Collective]) -> dict[tuple[str, ...], float]:
    """Returns the bytes that a device sends in a run of the program, by the axes that they go
    along.
    """
    volumes: dict[tuple[str, ...], float] = {}
    for collective in found:
        volumes[collective.axes] = volumes.get(collective.axes, 0.0) + collective.volume
    return volumes


def exposed_share(found: Iterable[Collective]) -> float:
    """Returns the share of all bytes that go while nothing is computed: those of collectives that
    are not asynchronous, or that end before anything else runs.

    Any computation counts as if it hid all of a collective: what is exposed by this measure is so,
    what is not may still be in part.
    """
    exposed = 0.0
    total = 0.0
    for collective in found:
        total += collective.volume
        if not collective.meanwhile:
            exposed += collective.volume
    return exposed / total if total else 0.0


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Follows the calls of a program from its entry.

    Attributes:
      module: the program.
      mesh: the devices.
      slice_index: the slice of each device.
    """

    module: Module
    mesh: AnyMesh
    slice_index: Int[np.ndarray, " devices"]

    def of_computation(self, computation: Computation) -> Iterator[Collective]:
        """Yields the collectives of one run of a computation."""
        for instruction in computation.instructions:
            yield from self._of_instruction(computation, instruction)

    def _of_instruction(
        self, computation: Computation, instruction: Instruction
    ) -> Iterator[Collective]:
        opcode = instruction.opcode
        is_start = opcode.endswith(_START)
        if opcode.removesuffix(_START) in KINDS:
            found = self._collective(computation, instruction)
            yield self._asynchronous(computation, instruction, found) if is_start else found
        elif opcode == "while":
            yield from self._of_loop(computation, instruction)
        elif opcode == "conditional":
            yield from self._of_branches(instruction)
        elif opcode == "fusion":
            for called in self.module.called(instruction):
                for each in self._of_fusion(called):
                    op_name = each.op_name or instruction.op_name
                    found = dataclasses.replace(each, op_name=op_name)
                    if each.is_async:
                        found = self._asynchronous(computation, instruction, found)
                    yield found
        elif is_start or opcode == "call":
            # `async-start` and, on a TPU's sparse cores, `call-start`
            for called in self.module.called(instruction):
                for each in self.of_computation(called):
                    yield self._asynchronous(computation, instruction, each) if is_start else each

    def _asynchronous(
        self, computation: Computation, start: Instruction, found: Collective
    ) -> Collective:
        """Returns a collective with what computes between an instruction that starts it and its
        end.
        """
        meanwhile = computed_meanwhile(self.module, computation, start)
        return dataclasses.replace(found, is_async=True, meanwhile=meanwhile)

    def _of_loop(self, computation: Computation, loop: Instruction) -> Iterator[Collective]:
        trips = trip_count(self.module, computation, loop)
        for called in self.module.called(loop):
            for each in self.of_computation(called):
                yield dataclasses.replace(
                    each,
                    times=each.times * (1 if trips is None else trips),
                    trips_known=each.trips_known and trips is not None,
                )

    def _of_branches(self, conditional: Instruction) -> Iterator[Collective]:
        branches = []
        for called in self.module.called(conditional):
            branches.append(list(self.of_computation(called)))

        volumes = [sum(each.volume for each in branch) for branch in branches]
        largest = volumes.index(max(volumes))
        for index, branch in enumerate(branches):
            for each in branch:
                times = each.times if index == largest else 0
                yield dataclasses.replace(each, times=times)

    def _of_fusion(self, fused: Computation) -> Iterator[Collective]:
        inside = [each for each in fused.instructions if each.opcode in KINDS]
        starts = any(SPREAD_START in each.attribute_text for each in fused.instructions)
        for instruction in inside:
            is_spread = _SPREAD in instruction.attribute_text
            if is_spread and not starts:
                continue
            found = self._collective(fused, instruction)
            found = dataclasses.replace(found, is_async=is_spread)
            if _is_scatter(fused):
                root = fused.root
                found = dataclasses.replace(
                    found, kind="reduce-scatter", shapes=root.shapes, result_bytes=root.bytes
                )
            yield found

    def _collective(self, computation: Computation, instruction: Instruction) -> Collective:
        operands = computation.operands(instruction)
        if instruction.opcode.startswith("ragged-all-to-all"):
            # The others are the buffer of the result, and which rows go where.
            operands = operands[:1]
        given = [shape for operand in operands for shape in operand.shapes]
        shapes = _result_shapes(computation, instruction)
        groups = parse_groups(instruction.attributes, self.mesh.size)
        largest = max(given, key=lambda shape: shape.bytes)
        return Collective(
            kind=instruction.opcode.removesuffix(_START),
            dtype=largest.dtype,
            operand_bytes=sum(shape.bytes for shape in given),
            result_bytes=sum(shape.bytes for shape in shapes),
            shapes=shapes,
            group_size=groups.shape[1],
            axes=axes_between(groups, self.mesh),
            op_name=computation.op_name(instruction),
            is_async=False,
            meanwhile=(),
            times=1,
            trips_known=True,
            crosses_slices=crosses_slices(groups, self.slice_index),
            aligns_scatter=self._aligns_scatter(computation, instruction),
            instruction=instruction.name,
            computation=computation.name,
        )

    def _aligns_scatter(self, computation: Computation, instruction: Instruction) -> bool:
        """Whether a permute sends a few rows of a reduce-scatter to the next device."""
        if not instruction.opcode.startswith("collective-permute"):
            return False
        operand = computation.operands(instruction)[0]
        while operand.opcode in ("slice", "copy", "bitcast"):
            operand = computation.operands(operand)[0]
        return any(map(_is_scatter, self.module.called(operand)))


def _is_scatter(fused: Computation) -> bool:
    """Whether a fusion is a TPU's reduce-scatter: an all-reduce of which a device takes its own
    part.
    """
    opcodes = [each.opcode for each in fused.instructions]
    return "all-reduce" in opcodes and fused.root.opcode == "dynamic-slice"


def _result_shapes(computation: Computation, instruction: Instruction) -> tuple[ArrayShape, ...]:
    """Returns what a collective gives; one that only starts gives it at its `-done`."""
    if not instruction.opcode.endswith(_START):
        return instruction.shapes
    done = instruction.opcode.removesuffix(_START) + "-done"
    for other in computation.instructions:
        if other.opcode == done and other.operands == (instruction.name,):
            return other.shapes
    raise AssertionError(f"{instruction.name} is never done")

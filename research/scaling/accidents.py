"""What the partitioner should not have done, found in a compiled program.

XLA's partitioner makes every program correct: where shardings do not fit, it gathers, permutes or
computes everything on every device, and says nothing. The shapes and the collectives of the
compiled program tell.
"""

import dataclasses
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from research.parallel.mesh_config import SlicesConfig
from research.scaling.array_forms import (
    Form,
    TableArray,
    accidental_forms,
    forms_of,
    gathered_forms,
)
from research.scaling.collectives import Collective, read_collectives
from research.scaling.hlo import Computation, Instruction, Module, parse_module
from research.scaling.replica_groups import AnyMesh

# What makes no array of its own: it is another's, or an argument.
_VIEWS = (
    "parameter",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "optimization-barrier",
)
# What moves an array to other devices without a sum.
_MOVES = ("all-gather", "all-to-all", "collective-permute", "ragged-all-to-all")
# The names of JAX's own exchanges: who writes one of them means it.
_WRITTEN = (
    "all_gather",
    "all_gather_invariant",
    "all_to_all",
    "ppermute",
    "psum_scatter",
    "ragged_all_to_all",
    "reduce_scatter",
)


class Finding(NamedTuple):
    """An accident.

    Attributes:
      what: it is.
      where: the instruction, and where in the traced function it comes from.
      bytes: of the array on a device, or that a device sends in a run.
    """

    what: str
    where: str
    bytes: int


@dataclasses.dataclass(frozen=True)
class ProgramArrays:
    """What a program's arrays are meant to be on its mesh.

    Attributes:
      mesh: the devices.
      parameters: of the program.
      activations: of the program.
      num_layers: layers that run as one loop, for each loop.
      slices: along each axis.
      large: bytes on one device from which an array, or what a collective gives, counts.
      summed: modules whose product is of no row: each device sums the columns of the width that it
        has, and all devices their parts.
    """

    mesh: AnyMesh
    parameters: tuple[TableArray, ...] = ()
    activations: tuple[TableArray, ...] = ()
    num_layers: tuple[int, ...] = ()
    slices: SlicesConfig = SlicesConfig()
    large: int = 2**20
    summed: tuple[str, ...] = ()

    def accidental_forms(self) -> dict[Form, TableArray]:
        """Returns the forms of arrays that are less sharded than the table says."""
        both = [*self.parameters, *self.activations]
        return accidental_forms(both, self.mesh, self.num_layers)


def accidents(
    text: str,
    arrays: ProgramArrays,
    expected: Collection[tuple[str, tuple[str, ...]]] | None = None,
) -> list[Finding]:
    """Returns everything that a compiled program does by accident.

    Args:
      text: of `compiled.as_text()`.
      arrays: of it.
      expected: kinds and axes of the collectives that it may have; None is any.
    """
    module = parse_module(text)
    # What moves nothing has no axes.
    moving = [each for each in read_collectives(module, arrays.mesh, arrays.slices) if each.axes]
    found = [each for each in moving if each.result_bytes >= arrays.large]
    findings = [
        *replications(module, arrays),
        *stack_gathers(found, arrays),
        *slow_collectives(found, arrays.slices),
        *reshardings(found, arrays),
    ]
    if expected is not None:
        findings += unexpected(found, expected, arrays.summed)
    return findings


def replications(module: Module, arrays: ProgramArrays) -> Iterator[Finding]:
    """Yields arrays that are less sharded on a device than the table says.

    A parameter may be gathered inside of its layer; the stack of all layers' may not. What a
    `shard_map` computes is a device's own from the start: there the form of an activation is a
    coincidence.
    """
    forms = arrays.accidental_forms()
    for computation, instruction in _materialized(module):
        where = _where(computation, instruction)
        for shape in instruction.shapes:
            array = forms.get(forms_of(shape))
            # A copy of bytes has as many numbers as a larger array.
            is_copy = shape.dtype == "s8"
            if array is None or is_copy or shape.bytes < arrays.large:
                continue
            if "/shard_map/" in where and array in arrays.activations:
                continue
            what = f"{array.name}, sharded as {array.spec}, is {shape} on each device"
            yield Finding(what, where, shape.bytes)


def stack_gathers(found: Iterable[Collective], arrays: ProgramArrays) -> Iterator[Finding]:
    """Yields gathers of parameters of all layers together."""
    stacks = [array for array in arrays.parameters if array.is_stack]
    forms = accidental_forms(stacks, arrays.mesh)
    for collective in found:
        for shape in collective.shapes:
            array = forms.get(forms_of(shape))
            if array is not None and collective.kind in _MOVES:
                what = f"all layers of {array.name} are gathered at once, as {shape}"
                yield _finding(what, collective)


def slow_collectives(found: Iterable[Collective], slices: SlicesConfig) -> Iterator[Finding]:
    """Yields collectives that run over the network between slices along axes that have none of
    it.
    """
    slow = [name for name, size in slices.sizes().items() if size > 1]
    for collective in found:
        fast = [axis for axis in collective.axes if axis not in slow]
        if collective.crosses_slices and fast:
            yield _finding(f"{', '.join(fast)} runs over the network between slices", collective)


def reshardings(found: Iterable[Collective], arrays: ProgramArrays) -> Iterator[Finding]:
    """Yields what the partitioner moves to other devices that is no parameter on its way to its
    layer.

    An exchange that the program itself names, as attention, experts and pipelines do, is none.
    """
    parameters = gathered_forms(arrays.parameters, arrays.mesh)
    for collective in found:
        is_written = collective.op_name.rpartition("/")[2] in _WRITTEN
        is_meant = is_written or collective.aligns_scatter
        if collective.kind not in _MOVES or is_meant:
            continue
        others = [shape for shape in collective.shapes if forms_of(shape) not in parameters]
        if others:
            shapes = ", ".join(map(str, others))
            yield _finding(f"{shapes} is moved between devices by the partitioner", collective)


def unexpected(
    found: Iterable[Collective],
    expected: Collection[tuple[str, tuple[str, ...]]],
    summed: Collection[str] = (),
) -> Iterator[Finding]:
    """Yields collectives of other kinds, or along other axes, than the expected ones; sums of a
    module of `summed` are expected.
    """
    for collective in found:
        modules = collective.op_name.split("/")
        is_sum = collective.kind == "all-reduce" and any(name in modules for name in summed)
        if not is_sum and (collective.kind, collective.axes) not in expected:
            yield _finding("it is not among the expected collectives", collective)


def _materialized(module: Module) -> Iterator[tuple[Computation, Instruction]]:
    """Yields the instructions whose results are arrays in memory: those outside of fusions."""
    pending = [module.computations[module.entry]]
    while pending:
        computation = pending.pop()
        for instruction in computation.instructions:
            if instruction.opcode in ("while", "conditional", "call"):
                pending += module.called(instruction)
            if instruction.opcode not in _VIEWS:
                yield computation, instruction


def _finding(what: str, collective: Collective) -> Finding:
    axes = " × ".join(collective.axes)
    where = f"{collective.kind} over {axes}, {collective.times} times: {collective.instruction}"
    return Finding(what, f"{where} of {collective.op_name}", round(collective.volume))


def _where(computation: Computation, instruction: Instruction) -> str:
    # An operand may say where its reader comes from.
    return f"{instruction.opcode} {instruction.name} of {computation.op_name(instruction)}"

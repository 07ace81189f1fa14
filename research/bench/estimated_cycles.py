"""The cycles of a program by the estimates that the TPU compiler writes beside its instructions.

An estimate is what the compiler's cost model gives an instruction of its schedule. Waits for what
another instruction copies from memory have none, and neither have kernels, whose programs the cost
model does not read, and some gathers and scatters.
"""

import dataclasses
import re
from collections.abc import Iterable

from research.scaling.hlo import Computation, Instruction, Module, parse_module
from research.scaling.loop_trips import trip_count

_ESTIMATE = re.compile(r'"estimated_cycles":"(\d+)"')
# What runs other computations without a schedule of its own.
_RUNS = ("call", "async-start", "call-start")


@dataclasses.dataclass(frozen=True)
class Cycles:
    """Of one run of a program.

    Attributes:
      estimated: of all that has an estimate.
      without: how often each kernel and fusion runs that has none, by its name.
    """

    estimated: int = 0
    without: dict[str, int] = dataclasses.field(default_factory=dict)

    def times(self, count: int) -> "Cycles":
        """Returns those of so many runs."""
        without = {name: count * runs for name, runs in self.without.items()}
        return Cycles(count * self.estimated, without)


def estimated_cycles(text: str, turns: int) -> Cycles:
    """Returns the cycles of a run. Of a conditional the branch counts that has most.

    Args:
      text: of `compiled.as_text()`, of a TPU program.
      turns: of the one loop that does not say how often it runs, if there is one.

    Raises:
      ValueError: several loops do not say how often they run, or nothing has an estimate.
    """
    module = parse_module(text)
    unknown = _unknown_loops(module)
    if len(unknown) > 1:
        raise ValueError(f"{', '.join(unknown)} do not say how often they run")

    cycles = _of_computations(module, [module.computations[module.entry]], turns)
    if not cycles.estimated:
        raise ValueError("no instruction of the program has an estimate of its cycles")
    return cycles


def _unknown_loops(module: Module) -> list[str]:
    """Returns the names of the loops whose turns only a run tells."""
    names = []
    for computation in module.computations.values():
        for each in computation.instructions:
            if each.opcode == "while" and trip_count(module, computation, each) is None:
                names.append(each.name)
    return names


def _of_computations(module: Module, computations: Iterable[Computation], turns: int) -> Cycles:
    """Returns the sum of what each computation takes."""
    estimated = 0
    without: dict[str, int] = {}
    for computation in computations:
        for instruction in computation.instructions:
            found = _of_instruction(module, computation, instruction, turns)
            estimated += found.estimated
            for name, runs in found.without.items():
                without[name] = without.get(name, 0) + runs
    return Cycles(estimated, without)


def _of_instruction(
    module: Module, computation: Computation, instruction: Instruction, turns: int
) -> Cycles:
    opcode = instruction.opcode
    if opcode == "while":
        trips = trip_count(module, computation, instruction)
        one = _of_computations(module, module.called(instruction), turns)
        if trips is None:
            trips = turns
        return one.times(trips)
    if opcode == "conditional":
        branches = [_of_computations(module, [each], turns) for each in module.called(instruction)]
        return max(branches, key=lambda branch: branch.estimated)
    if opcode in _RUNS:
        return _of_computations(module, module.called(instruction), turns)

    # What a fusion calls is in its own estimate.
    estimate = _ESTIMATE.search(instruction.attribute_text)
    if estimate is not None:
        return Cycles(int(estimate[1]))
    # Other custom calls only note what the compiler knows.
    is_kernel = opcode == "custom-call" and "tpu_custom_call" in instruction.attribute_text
    if is_kernel or opcode == "fusion":
        # `tessera_decode_attention.3` -> `tessera_decode_attention`
        return Cycles(0, {re.sub(r"\.\d+$", "", instruction.name): 1})
    return Cycles()

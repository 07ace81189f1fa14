"""What a compiled program computes while a collective runs.

The order of a computation's instructions is their schedule: what stands between the start of an
exchange and its end runs meanwhile.
"""

from research.scaling.hlo import Computation, Instruction, Module

# Instructions that take time on the cores; XLA puts elementwise ones into fusions.
_COMPUTING = ("fusion", "dot", "convolution", "custom-call", "while")
# What moves numbers and makes none: a fusion of it alone hides no exchange.
_MOVING = (
    "parameter",
    "constant",
    "iota",
    "bitcast",
    "broadcast",
    "copy",
    "reshape",
    "transpose",
    "slice",
    "dynamic-slice",
    "dynamic-update-slice",
    "pad",
    "concatenate",
    "tuple",
    "get-tuple-element",
    "all-gather",
    "all-reduce",
)
# Custom calls of TPUs that compute nothing.
_BOOKKEEPING = (
    '"AllocateBuffer"',
    '"ConcatBitcast"',
    '"AssumeGatherIndicesInBound"',
    '"PrepareAsyncCallStart"',
    '"PrepareAsyncCallDone"',
)
# The first and the last of the fusions that a TPU spreads a collective over.
SPREAD_START = '"AsyncCollectiveStart"'
SPREAD_DONE = '"AsyncCollectiveDone"'


def computed_meanwhile(
    module: Module, computation: Computation, start: Instruction
) -> tuple[str, ...]:
    """Returns the names of the instructions that compute between the start of a collective and its
    end.

    Args:
      module: the program.
      computation: that has the start.
      start: `collective-permute-start`, `async-start`, or the first of the fusions that a
        collective is spread over.
    """
    names = [each.name for each in computation.instructions]
    later = computation.instructions[names.index(start.name) + 1 :]
    meanwhile = []
    for instruction in later:
        if _ends(module, start, instruction):
            return tuple(meanwhile)
        if _computes(module, instruction):
            meanwhile.append(instruction.name)
    raise AssertionError(f"{start.name} is never done")


def _ends(module: Module, start: Instruction, instruction: Instruction) -> bool:
    if start.opcode != "fusion":
        done = start.opcode.removesuffix("-start") + "-done"
        return instruction.opcode == done and start.name in instruction.operands
    is_done = instruction.opcode == "fusion" and _has_call(module, instruction, SPREAD_DONE)
    return is_done and _channels(module, start) == _channels(module, instruction)


def _computes(module: Module, instruction: Instruction) -> bool:
    if instruction.opcode not in _COMPUTING:
        return False
    if any(target in instruction.attribute_text for target in _BOOKKEEPING):
        return False
    if instruction.opcode != "fusion":
        return True
    # Starts and ends of other collectives are fusions too.
    targets = (SPREAD_START, SPREAD_DONE)
    is_exchange = any(_has_call(module, instruction, target) for target in targets)
    return not is_exchange and _makes_numbers(module, instruction)


def _makes_numbers(module: Module, fusion: Instruction) -> bool:
    """Whether a fusion, or one inside of it, does more than to move arrays and to compute single
    numbers, which are indices.
    """
    for called in module.called(fusion):
        for each in called.instructions:
            if each.opcode == "fusion":
                makes = _makes_numbers(module, each)
            else:
                is_array = any(shape.size > 1 for shape in each.shapes)
                makes = is_array and each.opcode not in _MOVING
            if makes:
                return True
    return False


def _has_call(module: Module, instruction: Instruction, target: str) -> bool:
    """Whether the computation of a fusion has a custom call."""
    if instruction.opcode != "fusion":
        return False
    inside = [each for called in module.called(instruction) for each in called.instructions]
    return any(target in each.attribute_text for each in inside)


def _channels(module: Module, fusion: Instruction) -> set[str]:
    """Returns the channels of the collectives in a fusion: those of one collective are the same."""
    channels = set()
    for called in module.called(fusion):
        for each in called.instructions:
            if "channel_id" in each.attribute_text:
                channels.add(each.attributes["channel_id"])
    return channels

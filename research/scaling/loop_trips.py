"""How often the loops of a compiled program run, where the program says it."""

import json

from research.scaling.hlo import Computation, Instruction, Module

# What hands a number on as it is.
_COPIES = ("copy", "bitcast", "convert", "reshape")


def trip_count(module: Module, computation: Computation, loop: Instruction) -> int | None:
    """Returns how often the body of a `while` runs, or None where that is not known.

    XLA notes it for CPUs; the TPU compiler does not, so the counter is read: where it starts, what
    it is compared with, and what a turn adds to it.

    Args:
      module: the program.
      computation: that has the loop.
      loop: the `while`.
    """
    config = json.loads(loop.attributes.get("backend_config", "{}"))
    if "known_trip_count" in config:
        return int(config["known_trip_count"]["n"])

    carried = computation.operands(loop)[0]
    condition = module.computations[loop.attributes["condition"].removeprefix("%")]
    body = module.computations[loop.attributes["body"].removeprefix("%")]
    compared = _comparison(condition)
    if carried.opcode != "tuple" or body.root.opcode != "tuple" or compared is None:
        return None
    counter, bound, includes_bound = compared
    index = _element(counter)
    if index is None:
        return None

    first = _initial(computation, carried, index)
    limit = _constant(bound)
    if limit is None:
        limit = _unchanged(computation, carried, body, _element(bound))
    step = _step(computation, carried, body, index)
    if first is None or limit is None or not step or step < 0:
        return None
    # 0 below 7 by 2: 0, 2, 4 and 6
    end = limit + 1 if includes_bound else limit
    return max(0, -(-(end - first) // step))


def _comparison(condition: Computation) -> tuple[Instruction, Instruction, bool] | None:
    """Returns the counter, its bound, and whether the loop runs at the bound too."""
    compare = condition.root
    if compare.opcode != "compare":
        return None
    operands = [_origin(condition, name) for name in compare.operands]
    direction = compare.attributes["direction"]
    # `4 > i` is `i < 4`.
    if direction in ("GT", "GE"):
        operands.reverse()
    elif direction not in ("LT", "LE"):
        return None
    counter, bound = operands
    return counter, bound, direction in ("LE", "GE")


def _step(
    computation: Computation, carried: Instruction, body: Computation, index: int
) -> int | None:
    """Returns what a turn adds to an element of what the loop carries."""
    changed = _origin(body, body.root.operands[index])
    if changed.opcode != "add":
        return None
    sides = [_origin(body, name) for name in changed.operands]
    others = [side for side in sides if _element(side) != index]
    if len(others) != 1:
        return None
    step = _constant(others[0])
    if step is None:
        step = _unchanged(computation, carried, body, _element(others[0]))
    return step


def _unchanged(
    computation: Computation, carried: Instruction, body: Computation, index: int | None
) -> int | None:
    """Returns a number that a loop carries as it is, or None where it is not known."""
    if index is None:
        return None
    if _element(_origin(body, body.root.operands[index])) != index:
        return None
    return _initial(computation, carried, index)


def _initial(computation: Computation, carried: Instruction, index: int) -> int | None:
    return _constant(_origin(computation, carried.operands[index]))


def _origin(computation: Computation, name: str) -> Instruction:
    """Returns the instruction that makes a number, before all copies of it."""
    instruction = computation.by_name[name]
    while instruction.opcode in _COPIES:
        instruction = computation.by_name[instruction.operands[0]]
    return instruction


def _constant(instruction: Instruction) -> int | None:
    is_number = instruction.arguments.lstrip("-").isdigit()
    if instruction.opcode != "constant" or not is_number:
        return None
    return int(instruction.arguments)


def _element(instruction: Instruction) -> int | None:
    """Returns which element of a tuple an instruction takes."""
    if instruction.opcode != "get-tuple-element":
        return None
    return int(instruction.attributes["index"])

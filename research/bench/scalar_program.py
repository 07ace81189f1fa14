"""The scalar unit of a TPU core, as far as control flow needs it: 32-bit integers, predicates,
scalar memory.

Instructions are read in the compiler's own text and become Python source, a function a stretch of
bundles. Registers are the machine's own (`%s105_s6` is s6): values that merge after a branch merge
there.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

_INSTRUCTION = re.compile(
    r"^(?:%\w+?(?:_(?P<register>[sp]\d+))? = )?(?P<op>[a-z][\w.]*)(?: (?P<rest>.*))?$", re.DOTALL
)
_GUARD = re.compile(r"^\((!?%\w+)(?:, ([^)]*))?\),? ?")
_ADDRESS = re.compile(r"\[smem:\[([^]]*(?:\[[^]]*\])?[^]]*)\]\]?")
_ALLOCATION = re.compile(r"\[?#allocation(\d+)(?:_spill)?(?: \+ \$(0x[0-9a-f]+|\d+))?\]?")
_COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_BINARY = {
    "sadd.s32": "{0} + {1}",
    "ssub.s32": "{0} - {1}",
    "smul.u32": "{0} * {1}",
    "sshll.u32": "{0} << {1}",
    "sshra.s32": "{0} >> {1}",
    "sshrl.u32": "({0} & 0xffffffff) >> {1}",
    "sand.u32": "{0} & {1}",
    "sor.u32": "{0} | {1}",
    "sxor.u32": "{0} ^ {1}",
}
_PREDICATES = {
    "pnand": "negate(both({0}, {1}))",
    "pand": "both({0}, {1})",
    "por": "negate(both(negate({0}), negate({1})))",
    "pneg": "negate({0})",
    "pmov": "{0}",
}
# Words between allocations of scalar memory: no address reaches the next one.
_ALLOCATION_WORDS = 2**16


class _Unknown:
    """A value that no control flow may depend on: arithmetic keeps it, a decision refuses it."""

    def _same(self, *_: Any) -> "_Unknown":
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __and__ = __rand__ = __or__ = (
        __ror__
    ) = _same
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __xor__ = __rxor__ = _same

    def _unknown(self, _: Any) -> "_Unknown":
        return UNKNOWN

    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _unknown  # type: ignore[assignment]
    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise ValueError("the control flow depends on a vector or an operand that is not given")


class _Pointer(_Unknown):
    """An address within an operand, in whatever unit: only which operand it is is known."""

    def __init__(self, operand: int):
        self.operand = operand


UNKNOWN = _Unknown()
# Holds the number of the core; of a chip with two, the first is followed.
_CORE_ID = 0


class Machine:
    """Registers and scalar memory."""

    def __init__(self, operands: Sequence[Shaped[np.ndarray, "..."] | None]):
        self.s: list[Any] = [UNKNOWN] * 64
        self.p: list[Any] = [UNKNOWN] * 64
        self.memory: dict[int, Any] = {_CORE_ID: 0}
        self._operands = operands

    def load(self, address: Any) -> Any:
        """Returns a word of scalar memory."""
        return self.memory.get(address, UNKNOWN) if isinstance(address, int) else UNKNOWN

    def store(self, address: Any, value: Any) -> None:
        """Writes a word of scalar memory."""
        self.memory[address] = value

    def fetch(self, source: Any, target: Any) -> None:
        """Copies the operand that `source` points to, if it is given, to scalar memory at
        `target`.
        """
        if not isinstance(source, _Pointer) or source.operand >= len(self._operands):
            return
        operand = self._operands[source.operand]
        if operand is not None:
            self.memory |= enumerate(words(operand).tolist(), start=target)


def words(array: Shaped[np.ndarray, "..."]) -> Int[np.ndarray, " words"]:
    """Returns an operand as 32-bit words in the order in which it lies in scalar memory: tiles of
    (8, 128).

    Four rows of 8-bit numbers share a word; vectors of 32-bit numbers lie as they are.
    """
    if array.ndim == 1 and array.dtype.itemsize == 4:
        return array.astype(np.int32)
    rows = (
        array.reshape(-1, array.shape[-2], array.shape[-1])
        if array.ndim > 1
        else array.reshape(1, 1, -1)
    )
    height = 8
    while height // 2 >= max(rows.shape[1], 4 // rows.dtype.itemsize):
        height //= 2
    pads = [(0, -size % unit) for size, unit in zip(rows.shape, (1, height, 128), strict=True)]
    tiles = np.pad(rows, pads).astype(array.dtype)
    packed = 4 // array.dtype.itemsize
    a, b, c = tiles.shape
    tiles = tiles.reshape(a, b // height, height // packed, packed, c // 128, 128).transpose(
        0, 1, 4, 2, 5, 3
    )
    return np.ascontiguousarray(tiles).view(np.int32).ravel()


def wrap(value: Any) -> Any:
    """Returns a number as a signed one of 32 bits."""
    return (
        value if isinstance(value, _Unknown) else ((value + 0x80000000) & 0xFFFFFFFF) - 0x80000000
    )


def negate(predicate: Any) -> Any:
    """Returns not p, unknown where p is."""
    return predicate if isinstance(predicate, _Unknown) else not predicate


def both(first: Any, second: Any) -> Any:
    """Returns p and q, unknown where that is open."""
    if first is False or second is False:
        return False
    return UNKNOWN if isinstance(first, _Unknown) or isinstance(second, _Unknown) else True


def select(predicate: Any, value: Any, otherwise: Any) -> Any:
    """Returns one of two values, unknown where the predicate is."""
    return UNKNOWN if isinstance(predicate, _Unknown) else value if predicate else otherwise


def translate(
    bundles: Sequence[Sequence[str]], branches: Mapping[int, tuple[str, str | None, int]]
) -> Callable[[Machine], int | None]:
    """Returns a function that runs a stretch of bundles and returns the bundle to branch to, or
    None.

    Args:
      bundles: the instructions of each bundle.
      branches: for a bundle with a branch: `!` where it is taken if its predicate is false, the
        predicate's register (None where it is always taken), and the bundle that it leads to.
    """
    lines = ["def block(m):", "  s, p, target = m.s, m.p, None"]
    for i, bundle in enumerate(bundles):
        lines += [f"  {line}" for line in _bundle(bundle)]
        if i in branches:
            negated, register, to = branches[i]
            condition = "True" if register is None else f"{'not ' if negated else ''}p[{register}]"
            lines.append(f"  if {condition}: target = {to}")
    lines.append("  return target")
    names = {
        "Pointer": _Pointer,
        "wrap": wrap,
        "negate": negate,
        "both": both,
        "select": select,
        "UNKNOWN": UNKNOWN,
    }
    exec("\n".join(lines), names)
    return names["block"]


def _bundle(bundle: Sequence[str]) -> list[str]:
    """Returns the source of a bundle's scalar instructions; all of them read before any of them
    writes.

    Merges of values and casts of pointers are no instructions: they name a register anew.
    """
    reads, writes = [], []
    for instruction in bundle:
        match = _INSTRUCTION.match(re.sub(r"^%\w+ = (?=sst|dma|sbr)", "", instruction))
        if match is None:
            continue
        op, rest, register = match.group("op"), match.group("rest") or "", match.group("register")
        guard = _GUARD.match(rest)
        rest = rest[guard.end() :] if guard else rest
        when = _value(guard.group(1)) if guard else None
        temporary = f"t{len(reads)}"
        if register is not None and op != "sphi" and not op.startswith("int_to_ptr"):
            target = f"{register[0]}[{register[1:]}]"
            value = _expression(op, rest)
            if when is not None:
                otherwise = _value(guard.group(2)) if guard.group(2) else target
                value = f"select({when}, {value}, {otherwise})"
            reads.append(f"{temporary} = {value}")
            writes.append(f"{target} = {temporary}")
        elif op == "sst" and (address := _ADDRESS.match(rest)):
            value = _value(rest[address.end() :].strip().lstrip(",").strip())
            reads.append(f"{temporary} = ({_sum(address.group(1))}, {value})")
            writes.append(f"{f'if {when}: ' if when else ''}m.store(*{temporary})")
        elif op in ("dma.hbm_to_smem", "dma.vmem_to_smem"):
            source, _, target = (part.strip() for part in rest.split(",")[:3])
            reads.append(f"{temporary} = ({_value(source)}, {_value(target)})")
            writes.append(f"{f'if {when}: ' if when else ''}m.fetch(*{temporary})")
    return reads + writes


def _expression(op: str, rest: str) -> str:
    """Returns the source of an instruction's value; `UNKNOWN` where it is a vector's, or never met
    before.
    """
    if op == "sld" and (address := _ADDRESS.match(rest)):
        return f"m.load({_sum(address.group(1))})"
    if op.startswith("inlined_call_operand"):
        return f"Pointer({re.search(r'index: ([0-9]+)', rest).group(1)})"
    values = [_value(part) for part in _split(rest)]
    if op == "smov":
        return values[0]
    if op == "scalar_select":
        return f"select({', '.join(values)})"
    if op.startswith("scalar_lea"):
        return f"wrap({' + '.join(values)})"
    if op in _BINARY:
        return f"wrap({_BINARY[op].format(*values)})"
    if op in _PREDICATES:
        return _PREDICATES[op].format(*values)
    if match := re.match(r"scmp\.(\w+)\.([su])32", op):
        unsigned = " & 0xffffffff" if match.group(2) == "u" else ""
        return f"({values[0]}{unsigned}) {_COMPARISONS[match.group(1)]} ({values[1]}{unsigned})"
    return "UNKNOWN"


def _split(rest: str) -> list[str]:
    return [part.strip() for part in rest.split(",") if part.strip()]


def _sum(address: str) -> str:
    return " + ".join(_value(part.strip()) for part in re.split(r" \+ (?!\$)", address))


def _value(token: str) -> str:
    """Returns the source of an operand: a register, a number, or the address of an allocation."""
    token = token.strip()
    if match := re.fullmatch(r"(!?)%\w+_([sp])(\d+)", token):
        register = f"{match.group(2)}[{match.group(3)}]"
        return f"negate({register})" if match.group(1) else register
    if match := _ALLOCATION.fullmatch(token):
        return str(int(match.group(1)) * _ALLOCATION_WORDS + int(match.group(2) or "0", 0))
    if re.fullmatch(r"-?\d+|0x[0-9a-f]+", token):
        value = int(token, 0)
        return str(value - 2**32 if value >= 2**31 else value)
    return "UNKNOWN"

"""An emulator of the scalar unit of a TPU core, as far as control flow needs it: 32-bit integers,
predicates, scalar memory.

The compiler's text of instructions becomes Python source, one function a basic block. Registers are
the machine's own (`%s105_s6` is s6), so values that merge after a branch are in one register.
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
    "smin.u32": "lesser({0} & 0xffffffff, {1} & 0xffffffff)",
}
_PREDICATES = {
    "pnand": "negate(both({0}, {1}))",
    "pand": "both({0}, {1})",
    "por": "negate(both(negate({0}), negate({1})))",
    "pneg": "negate({0})",
    "pmov": "{0}",
}
# Words between allocations of scalar memory: more than any allocation has.
_ALLOCATION_WORDS = 2**16


class _Unknown:
    """A value that is not known here: arithmetic with it is unknown, a branch on it an error."""

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
    """An address within an operand, of which only the operand is known."""

    def __init__(self, operand: int):
        self.operand = operand


UNKNOWN = _Unknown()
# The address that holds the number of the core: 0, the first of a chip with two.
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
    """Returns an operand as 32-bit words in the order of scalar memory: tiles of (8, 128).

    Four rows of 8-bit numbers share a word; vectors of 32-bit numbers have no tiles.
    """
    itemsize = array.dtype.itemsize
    if array.ndim == 1 and itemsize == 4:
        return array.astype(np.int32)
    matrices = array.reshape(1, 1, -1)
    if array.ndim > 1:
        matrices = array.reshape(-1, *array.shape[-2:])

    # Few rows have lower tiles: 4 rows of 32-bit numbers one of (4, 128).
    height = 8
    rows_a_word = 4 // itemsize
    while height // 2 >= max(matrices.shape[1], rows_a_word):
        height //= 2

    # Padded to whole tiles: [matrices, rows, columns] -> the axes of tiles and words.
    units = zip(matrices.shape, (1, height, 128), strict=True)
    pads = [(0, -size % unit) for size, unit in units]
    padded = np.pad(matrices, pads).astype(array.dtype)
    count, rows, columns = padded.shape
    words_high = height // rows_a_word
    shape = (count, rows // height, words_high, rows_a_word, columns // 128, 128)
    # Tiles of a row of tiles follow each other, and the rows of a word are its bytes.
    ordered = padded.reshape(shape).transpose(0, 1, 4, 2, 5, 3)
    return np.ascontiguousarray(ordered).view(np.int32).ravel()


def wrap(value: Any) -> Any:
    """Returns a number as a signed one of 32 bits."""
    if isinstance(value, _Unknown):
        return value
    return ((value + 0x80000000) & 0xFFFFFFFF) - 0x80000000


def negate(predicate: Any) -> Any:
    """Returns not p, unknown where p is."""
    if isinstance(predicate, _Unknown):
        return predicate
    return not predicate


def both(first: Any, second: Any) -> Any:
    """Returns p and q, unknown where it depends on what is unknown."""
    if first is False or second is False:
        return False
    if isinstance(first, _Unknown) or isinstance(second, _Unknown):
        return UNKNOWN
    return True


def select(predicate: Any, value: Any, otherwise: Any) -> Any:
    """Returns one of two values, unknown where the predicate is."""
    if isinstance(predicate, _Unknown):
        return UNKNOWN
    return value if predicate else otherwise


def lesser(first: Any, second: Any) -> Any:
    """Returns the lesser of two numbers, unknown where one of them is."""
    return select(first < second, first, second)


def translate(
    bundles: Sequence[Sequence[str]], branches: Mapping[int, tuple[str, str | None, int]]
) -> Callable[[Machine], int | None]:
    """Returns a function that runs a basic block and returns the bundle to branch to, or None.

    Args:
      bundles: the instructions of each bundle.
      branches: for a bundle with a branch: `!` where it is taken if its predicate is false, the
        predicate's register (None where it is always taken), and the bundle that it leads to.
    """
    # A loop's block: `s[5] = t0` for each scalar instruction, then `if p[1]: target = 4`.
    lines = ["def block(m):", "  s = m.s", "  p = m.p", "  target = None"]
    for i, bundle in enumerate(bundles):
        lines += [f"  {line}" for line in _bundle_source(bundle)]
        if i in branches:
            negated, register, to = branches[i]
            condition = "True" if register is None else f"p[{register}]"
            if negated:
                condition = f"not {condition}"
            lines.append(f"  if {condition}: target = {to}")
    lines.append("  return target")

    names = {
        "Pointer": _Pointer,
        "wrap": wrap,
        "negate": negate,
        "both": both,
        "select": select,
        "lesser": lesser,
        "UNKNOWN": UNKNOWN,
    }
    exec("\n".join(lines), names)
    return names["block"]


def _bundle_source(bundle: Sequence[str]) -> list[str]:
    """Returns the source of a bundle's scalar instructions; all of them read before any of them
    writes.
    """
    # `{ s1 = s2 ;; s2 = s1 }` -> t0 = s[2], t1 = s[1], s[1] = t0, s[2] = t1
    reads = []
    writes = []
    for instruction in bundle:
        source = _instruction_source(instruction, f"t{len(reads)}")
        if source is not None:
            read, write = source
            reads.append(read)
            writes.append(write)
    return reads + writes


def _instruction_source(instruction: str, temporary: str) -> tuple[str, str] | None:
    """Returns the source that reads a scalar instruction's operands into `temporary`, and the one
    that writes its result; None for an instruction of another unit.

    Merges of values (`sphi`) and casts of pointers only give a register another name.
    """
    match = _INSTRUCTION.match(re.sub(r"^%\w+ = (?=sst|dma|sbr)", "", instruction))
    if match is None:
        return None
    op = match.group("op")
    rest = match.group("rest") or ""
    register = match.group("register")

    # A predicate that guards the instruction, and the value that its register has otherwise.
    guard = _GUARD.match(rest)
    when = None
    if guard:
        when = _value(guard.group(1))
        rest = rest[guard.end() :]
    prefix = f"if {when}: " if when else ""

    if register is not None and op != "sphi" and not op.startswith("int_to_ptr"):
        target = f"{register[0]}[{register[1:]}]"
        value = _expression(op, rest)
        if when is not None:
            otherwise = _value(guard.group(2)) if guard.group(2) else target
            value = f"select({when}, {value}, {otherwise})"
        return f"{temporary} = {value}", f"{target} = {temporary}"

    address = _ADDRESS.match(rest)
    if op == "sst" and address:
        value = _value(rest[address.end() :].strip().lstrip(","))
        read = f"{temporary} = ({_sum(address.group(1))}, {value})"
        return read, f"{prefix}m.store(*{temporary})"

    if op in ("dma.hbm_to_smem", "dma.vmem_to_smem"):
        source, _, target, *_ = rest.split(",")
        read = f"{temporary} = ({_value(source)}, {_value(target)})"
        return read, f"{prefix}m.fetch(*{temporary})"
    return None


def _expression(op: str, rest: str) -> str:
    """Returns the source of an instruction's value; `UNKNOWN` where it is a vector's, or of an
    instruction that is not emulated.
    """
    address = _ADDRESS.match(rest)
    if op == "sld" and address:
        return f"m.load({_sum(address.group(1))})"
    if op.startswith("inlined_call_operand"):
        index = re.search(r"index: ([0-9]+)", rest).group(1)
        return f"Pointer({index})"

    values = [_value(part) for part in rest.split(",") if part.strip()]
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

    # scmp.lt.u32.totalorder: a signed register is compared as an unsigned number.
    comparison = re.match(r"scmp\.(\w+)\.([su])32", op)
    if comparison:
        name, sign = comparison.groups()
        unsigned = " & 0xffffffff" if sign == "u" else ""
        left = f"({values[0]}{unsigned})"
        right = f"({values[1]}{unsigned})"
        return f"{left} {_COMPARISONS[name]} {right}"
    return "UNKNOWN"


def _sum(address: str) -> str:
    # `%s3_s1 + 4`, but not `#allocation3 + $0x4`, which is one value.
    return " + ".join(_value(part) for part in re.split(r" \+ (?!\$)", address))


def _value(token: str) -> str:
    """Returns the source of an operand: a register, a number, or the address of an allocation."""
    token = token.strip()
    # `!%p15_p1` -> negate(p[1])
    match = re.fullmatch(r"(!?)%\w+_([sp])(\d+)", token)
    if match:
        negated, kind, number = match.groups()
        register = f"{kind}[{number}]"
        return f"negate({register})" if negated else register

    # `[#allocation3 + $0x4]` -> 3 * 2**16 + 4
    match = _ALLOCATION.fullmatch(token)
    if match:
        allocation, offset = match.groups()
        first_word = int(allocation) * _ALLOCATION_WORDS
        return str(first_word + int(offset or "0", 0))

    # `4294967295` -> -1
    if re.fullmatch(r"-?\d+|0x[0-9a-f]+", token):
        value = int(token, 0)
        if value >= 2**31:
            value -= 2**32
        return str(value)
    return "UNKNOWN"

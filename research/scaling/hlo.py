"""A compiled program as its text says it: computations of instructions, in XLA's HLO form.

The text is that of `compiled.as_text()`, after optimization: shapes are those of one device, and
the order of instructions in a computation is their schedule.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

# `bf16[4,8]`; layouts, `{1,0:T(8,128)}`, have no brackets of this kind.
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([0-9,<=]*)\]")
_CLOSING = {"(": ")", "[": "]", "{": "}"}
# Attributes that name the computations that an instruction runs.
_CALLS = (
    "calls",
    "to_apply",
    "body",
    "condition",
    "branch_computations",
    "true_computation",
    "false_computation",
    "called_computations",
)


@dataclasses.dataclass(frozen=True)
class ArrayShape:
    """Type and sizes of an array on one device.

    Attributes:
      dtype: as XLA spells it, `bf16`.
      dims: its sizes.
    """

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Its elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Its bytes; those of a token are 0."""
        # bf16 -> 16, f8e4m3fn -> 8, pred -> 8
        digits = re.search(r"\d+", self.dtype)
        bits = int(digits[0]) if digits else 8
        if self.dtype in ("token", "opaque"):
            bits = 0
        return math.ceil(self.size * bits / 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: without `%`.
      opcode: `all-gather`, `fusion`.
      shapes: of the result; of a tuple those of all arrays in it, in order.
      arguments: what stands between the parentheses: operands, or the value of a constant.
      attribute_text: what follows them.
      is_root: whether it is what the computation returns.
    """

    name: str
    opcode: str
    shapes: tuple[ArrayShape, ...]
    arguments: str
    attribute_text: str
    is_root: bool

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """The names of the instructions that it reads."""
        # `f32[8]{0} %a, /*index=1*/%b` -> a, b; a constant's value has no name in it.
        parts = [part.rpartition("%") for part in split(self.arguments)]
        return tuple(name for _, percent, name in parts if percent)

    @functools.cached_property
    def attributes(self) -> dict[str, str]:
        """What follows the operands, by name: `dimensions` is `{0}`."""
        pairs = [part.partition("=") for part in split(self.attribute_text)]
        return {name.strip(): value.strip() for name, _, value in pairs if name.strip()}

    @property
    def op_name(self) -> str:
        """Where in the traced function it comes from: `jit(step)/jvp(Transformer)/…`; empty where
        the compiler does not say.
        """
        return _quoted(self.attribute_text, 'op_name="')

    @property
    def called(self) -> tuple[str, ...]:
        """The names of the computations that it runs."""
        names = []
        for attribute in _CALLS:
            # `%a` or `{%a, %b}`
            value = self.attributes.get(attribute, "").strip("{}")
            names += [name.strip().removeprefix("%") for name in split(value) if name.strip()]
        return tuple(names)

    @property
    def bytes(self) -> int:
        """Bytes of the result."""
        return sum(shape.bytes for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order of the schedule.

    Attributes:
      name: without `%`.
      instructions: of it.
    """

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @property
    def root(self) -> Instruction:
        """What the computation returns."""
        return next(each for each in self.instructions if each.is_root)

    def operands(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """Returns the instructions that one of them reads."""
        return tuple(self.by_name[name] for name in instruction.operands)

    def op_name(self, instruction: Instruction) -> str:
        """Returns where an instruction comes from: where it does not say, what its first operand
        says, and so on.
        """
        while not instruction.op_name and instruction.operands:
            instruction = self.operands(instruction)[0]
        return instruction.op_name


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: the name of the one that is run.
    """

    computations: dict[str, Computation]
    entry: str

    def called(self, instruction: Instruction) -> tuple[Computation, ...]:
        """Returns the computations that an instruction runs."""
        return tuple(self.computations[name] for name in instruction.called)


def parse_module(text: str) -> Module:
    """Returns the computations of a compiled program.

    Args:
      text: of `compiled.as_text()`.
    """
    computations: dict[str, Computation] = {}
    entry = ""
    for header, lines in _blocks(text):
        # `ENTRY %main.5 (param: f32[8]) -> f32[8] {`, `%region_0.4 (…) -> … {`
        name = header.removeprefix("ENTRY ").split(" ", 1)[0].removeprefix("%")
        if header.startswith("ENTRY "):
            entry = name
        computations[name] = Computation(name, tuple(map(_parse_instruction, lines)))
    assert entry, "the text has no entry computation"
    return Module(computations, entry)


def _blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yields each computation's first line and the lines of its instructions."""
    header = None
    lines: list[str] = []
    for line in text.splitlines():
        if header is None and line.startswith(("%", "ENTRY ")) and line.endswith("{"):
            header = line
        elif header is not None and line.startswith("}"):
            yield header, lines
            header = None
            lines = []
        elif header is not None and line.strip():
            lines.append(line)


def _parse_instruction(line: str) -> Instruction:
    # `  ROOT %add.1 = f32[8]{0} add(%a, %b), metadata={…}`
    text = line.strip()
    is_root = text.startswith("ROOT ")
    name, _, rest = text.removeprefix("ROOT ").partition(" = ")

    # The type has spaces only where it is a tuple.
    end = _group_end(rest, 0) if rest.startswith("(") else rest.index(" ")
    shapes = tuple(_parse_arrays(rest[:end]))
    opcode, _, _ = rest[end:].strip().partition("(")
    start = rest.index("(", end)
    stop = _group_end(rest, start)
    return Instruction(
        name=name.removeprefix("%"),
        opcode=opcode,
        shapes=shapes,
        arguments=rest[start + 1 : stop - 1],
        attribute_text=rest[stop:].removeprefix(", "),
        is_root=is_root,
    )


def _parse_arrays(text: str) -> Iterator[ArrayShape]:
    # `(f32[8,16]{1,0}, s32[])` -> f32 of 8 × 16, s32 of no axes
    for dtype, dims in _ARRAY.findall(text):
        # A size that is known at run time alone has its bound: `<=8`.
        sizes = dims.replace("<=", "").split(",") if dims else []
        yield ArrayShape(dtype, tuple(map(int, sizes)))


def _group_end(text: str, start: int) -> int:
    """Returns the index behind the bracket that closes the one at `start`."""
    depth = 0
    for index, character in _outside_quotes(text, start):
        if character in _CLOSING:
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0:
                return index + 1
    raise AssertionError(f"a bracket is not closed in {text[start : start + 80]}")


def split(text: str) -> list[str]:
    """Returns the parts of a text between commas outside of brackets and quotes."""
    parts = []
    depth = 0
    start = 0
    for index, character in _outside_quotes(text, 0):
        if character in _CLOSING:
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [*parts, text[start:]]


# What tells brackets, quotes and commas in a line; a quote within quotes has a backslash.
_MARKS = re.compile(r'"(?:[^"\\]|\\.)*"|[][(){},]')


def _outside_quotes(text: str, start: int) -> Iterator[tuple[int, str]]:
    """Yields the brackets and commas outside of quotes, with their indices."""
    for match in _MARKS.finditer(text, start):
        if not match[0].startswith('"'):
            yield match.start(), match[0]


def _quoted(text: str, start: str) -> str:
    """Returns what stands between a start and the next quote, or nothing."""
    _, _, rest = text.partition(start)
    return rest.partition('"')[0]

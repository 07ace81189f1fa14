"""Programs as XLA prints them: recorded lines of CPU and TPU programs."""

import pathlib

import pytest

from research.scaling.hlo import ArrayShape, parse_module

PROGRAMS = pathlib.Path(__file__).with_name("programs")
ALL = sorted(path.stem for path in PROGRAMS.glob("*.hlo"))
# Lines that XLA printed: layouts with tiles, an index among the operands, a mesh with an order of
# devices, names with commas and brackets, a constant of several numbers.
LINES = """HloModule jit_step

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}, execution_thread="sparsecore"

ENTRY %main.2_spmd (x: bf16[8,16], y: bf16[8,16]) -> (bf16[8,16], bf16[8,16]) {
  %x = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0), sharding={devices=[2,1,4]<=[8]}
  %y = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(1)
  %table = u32[4]{0:T(128)} constant({0, 0, 1, 1})
  ROOT %all-reduce.9 = (bf16[8,16]{1,0:T(8,128)(2,1)}, /*index=1*/bf16[8,16]{1,0}) all-reduce(%x, /*index=1*/bf16[8,16]{1,0} %y), channel_id=18, replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_0'}, use_global_device_ids=true, to_apply=%add.1, metadata={op_name="jit(step)/mlp/(gate/dot_general:up/dot_general), [0]" stack_frame_id=174}, backend_config={"debug":"\\nshards {\\"2\\"} ), of (","known_trip_count":{"n":"4"}}
}
"""  # noqa: E501


def test_line_has_its_parts():
    module = parse_module(LINES)
    assert module.entry == "main.2_spmd"
    assert list(module.computations) == ["add.1", "main.2_spmd"]
    reduce = module.computations[module.entry].root
    assert (reduce.name, reduce.opcode) == ("all-reduce.9", "all-reduce")
    assert reduce.operands == ("x", "y")
    assert reduce.shapes == (ArrayShape("bf16", (8, 16)),) * 2
    assert reduce.bytes == 2 * 8 * 16 * 2
    assert reduce.called == ("add.1",)
    assert reduce.op_name == "jit(step)/mlp/(gate/dot_general:up/dot_general), [0]"
    assert reduce.attributes["device_ids"] == "([2,2,2]T(1,0,2)) {'axis_0'}"
    assert reduce.attributes["use_global_device_ids"] == "true"
    table = module.computations[module.entry].by_name["table"]
    assert (table.operands, table.arguments) == ((), "{0, 0, 1, 1}")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (ArrayShape("bf16", (3, 5)), 30),
        (ArrayShape("f8e4m3fn", (3, 5)), 15),
        (ArrayShape("s4", (3, 5)), 8),
        (ArrayShape("pred", (3,)), 3),
        (ArrayShape("f32", ()), 4),
        (ArrayShape("token", ()), 0),
    ],
    ids=str,
)
def test_bytes_of_an_array(shape: ArrayShape, expected: int):
    assert shape.bytes == expected


@pytest.mark.parametrize("name", ALL)
def test_every_line_of_a_recorded_program_is_read(name: str):
    text = (PROGRAMS / f"{name}.hlo").read_text()
    module = parse_module(text)
    computations = module.computations.values()
    lines = [line for line in text.splitlines() if " = " in line]
    assert sum(len(each.instructions) for each in computations) == len(lines) > 50
    for computation in computations:
        for instruction in computation.instructions:
            # Operands and computations that an instruction names are there.
            computation.operands(instruction)
            module.called(instruction)
            assert instruction.name in text
            assert instruction.opcode.replace("-", "").isalnum()

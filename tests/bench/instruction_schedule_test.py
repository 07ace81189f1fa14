"""A kernel's schedule is counted by running its scalar program."""

import functools
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from research.bench.instruction_schedule import kernel_programs, run_program
from research.bench.scalar_program import words

# A loop of `limit` rounds, `limit` being the first word of operand 0, around a region that every
# other round skips.
PROGRAM = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = inlined_call_operand.hbm [index: 0, may-alias: {0}] ;; %s2_s1 = smov 196608 }
   0x1   :  { %3 = dma.hbm_to_smem /*hbm=*/%s1_s0, /*size*/2, /*smem=*/%s2_s1, [#allocation2] }
   0x2   :  { %s4_s2 = sld [smem:[#allocation3]]  ;;  %s5_s3 = smov 4294967295 }
   0x3   :  { %s6_s4 = sand.u32 7, %s4_s2  ;;  %s6_s5 = smov 0 } /* Start region 1 */
   0x4 LB: > { %s7_s5 = sphi %s6_s5, %s8_s5  ;;  %s9_s6 = sand.u32 1, %s7_s5 } /* Start region 2 */
   0x5   : > { %p10_p0 = scmp.ne.s32.totalorder %s9_s6, 0  ;;  %s8_s5 = ssub.s32 %s7_s5, %s5_s3 }
   0x6   : > { %11 = sbr.rel (%p10_p0) target = $region4  ;;  %s16_s7 = smin.u32 %s5_s3, %s6_s4 }
   0x7   : > { %v12_v0 = vmov 0.0 } /* End region 3 */
   0x8   : > { %13 = vmatmul.bf16.gmra.mxu0 %v12_v0 }
   0x9   : > { %14 = vmatmul.bf16.gmra.mxu0 %v12_v0 }
   0xa PF: > { %p15_p1 = scmp.lt.s32.totalorder %s8_s5, %s16_s7 } /* Start/End empty region 4 */
   0xb   : > { %16 = sbr.rel (%p15_p1) target = $region2 }
   0xc   : > {} /* End region 2 */
   0xd   :  { %17 = vsyncpa [#allocation6], 1 }
"""
USE = "== CAPACTIY:\nMXU, SALU\n    4     2\n== UTILIZATION:\n"


def write_dump(folder: pathlib.Path) -> pathlib.Path:
    rows = ["0 2"] * 8 + ["4 0", "2 0"] + ["0 1"] * 4
    (folder / "17-toy.1-70-final_hlo-static-per-bundle-utilization.txt").write_text(
        USE + "\n".join(rows) + "\n"
    )
    (folder / "17-toy.1-71-schedule-analysis_final_bundles.txt").write_text("")
    program = folder / "17-toy.1-72-final_bundles.txt"
    program.write_text(PROGRAM)
    return program


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_bundles_are_counted_as_the_loop_and_the_predicate_say(tmp_path, rounds):
    schedule = run_program(write_dump(tmp_path), [np.array([rounds, 9, 9], np.int32)])
    even = (rounds + 1) // 2
    assert schedule.counts.tolist() == [1] * 4 + [rounds] * 4 + [even] * 2 + [rounds] * 3 + [1]
    assert schedule.cycles == 5 + 7 * rounds + 2 * even
    assert schedule.utilization("MXU") == pytest.approx(6 * even / (4 * schedule.cycles))
    assert schedule.regions()[0] == ((0, 14, 1) if rounds == 1 else (0, 4, 1))
    assert list(kernel_programs(tmp_path)) == ["toy.1"]


def test_control_that_depends_on_an_operand_not_given_is_refused(tmp_path):
    with pytest.raises(ValueError, match="an operand that is not given"):
        run_program(write_dump(tmp_path))


def test_operands_lie_in_scalar_memory_as_tiles():
    bytes_ = np.arange(2 * 8 * 4, dtype=np.int8).reshape(2, 8, 4)
    found = words(bytes_).view(np.int8).reshape(2, 2, 128, 4)
    for matrix, row, column in np.ndindex(bytes_.shape):
        assert found[matrix, row // 4, column, row % 4] == bytes_[matrix, row, column]
    assert words(np.array([5, 6], np.int32)).tolist() == [5, 6]


KERNEL = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from research.bench.instruction_schedule import kernel_programs, run_program
from research.scaling.topology import compile_on, tpu_devices

def double(x_ref, o_ref):
    o_ref[...] = 2 * x_ref[...]

def program(x):
    rows = pl.BlockSpec((8, 128), lambda i: (i, 0))
    return pl.pallas_call(
        double, jax.ShapeDtypeStruct(x.shape, x.dtype), grid=(x.shape[0] // 8,),
        in_specs=[rows], out_specs=rows, name="double",
    )(x)

rows = jax.ShapeDtypeStruct((8 * int(sys.argv[2]), 128), jnp.float32)
compile_on(tpu_devices(sys.argv[1])[0], program, rows)
found = kernel_programs(pathlib.Path(sys.argv[3]))
(path,) = [path for name, path in found.items() if name.startswith("double")]
print(json.dumps(run_program(path).cycles))
"""


@functools.cache
def cycles(chip: str, steps: int, folder: pathlib.Path) -> int:
    flags = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    command = [sys.executable, "-c", KERNEL, chip, str(steps), str(folder)]
    found = subprocess.run(
        command, env=os.environ | {"LIBTPU_INIT_ARGS": flags}, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout.splitlines()[-1])


@pytest.mark.compilers
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_each_step_of_a_grid_costs_as_much_as_the_one_before(chip, tmp_path):
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    few, more, many = (cycles(chip, steps, tmp_path / str(steps)) for steps in (8, 16, 32))
    assert more - few > 8
    assert many - more == 2 * (more - few)

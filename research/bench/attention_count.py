"""Attention compiled for a TPU and counted: `python -m research.bench.attention_count DUMP SIDE
CHIP LENGTH`.

A process of its own, since the compiler reads where to write schedules when it is loaded.
"""

import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from research.bench.instruction_schedule import InstructionSchedule, kernel_programs, run_program
from research.kernels.attention import AttentionMask, attention, tpu
from research.kernels.attention.tpu_backward import backward_plans
from research.kernels.attention.tpu_forward import forward_plan
from research.parallel.target import compiling_for
from research.scaling.topology import compile_on, tpu_devices

HEADS = 16
WIDTH = 128
# Matrix products of each direction, of 2 operations a pair of tokens and column.
PRODUCTS = {"forward": 2, "backward": 5}

# What is compiled, the shape of q, and the scalars that each kernel prefetches, by its name.
Side = tuple[Callable[..., Any], tuple[int, ...], dict[str, Sequence[Any]]]


def tessera_side(length: int) -> Side:
    """Returns value and gradients of this project's attention, causal."""
    # Tiles that the mask leaves, which the kernels' grids visit in this order.
    mask = AttentionMask(causal=True)
    forward, backward = tpu.choose_blocks(WIDTH, 2, False, length, length)
    tiles = {
        "forward": forward_plan(mask, length, length, forward),
        "backward": backward_plans(mask, length, length, backward)[0],
    }

    def call(q: Any, k: Any, v: Any) -> Any:
        return attention(q, k, v, mask=mask, implementation="tpu")

    scalars = {}
    for name, plan in tiles.items():
        scalars[f"tessera_attention_{name}"] = (plan.counts, plan.order)
    return _value_and_gradients(call), (1, length, HEADS, WIDTH), scalars


def splash_side(length: int, queries: int, keys: int, computed: int, fused: int) -> Side:
    """Returns value and gradients of JAX's splash attention, causal.

    Args:
      length: tokens.
      queries: of a block.
      keys: of a block.
      computed: keys that are computed at a time.
      fused: 1 for one backward kernel, 0 for one of dq and one of dk and dv.
    """
    dq_blocks = {} if fused else {"block_q_dq": queries, "block_kv_dq": keys}
    blocks = splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=computed,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=computed,
        use_fused_bwd_kernel=bool(fused),
        **dq_blocks,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * HEADS)
    kernel = splash.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)

    infos = {
        "splash_mha_fwd": kernel.fwd_mask_info,
        "splash_mha_dkv": kernel.dkv_mask_info,
        "splash_mha_dq": kernel.dq_mask_info,
    }
    # A kernel that the other form of the backward pass has is None.
    scalars = {}
    for name, info in infos.items():
        if info is not None:
            arrays = (info.data_next, info.block_mask, info.mask_next)
            scalars[name] = [array for array in arrays if array is not None]
    return _value_and_gradients(kernel), (HEADS, length, WIDTH), scalars


def _value_and_gradients(call: Callable[..., Any]) -> Callable[..., Any]:
    def step(q: Any, k: Any, v: Any, g: Any) -> Any:
        out, pull_back = jax.vjp(call, q, k, v)
        return out, pull_back(g)

    return step


def count(folder: pathlib.Path, side: str, chip: str, length: int, *blocks: int) -> dict[str, Any]:
    """Returns cycles, cycles a useful multiply-add and how full the matrix units are, forward and
    backward.
    """
    device = tpu_devices(chip)[0]
    with compiling_for("tpu", device.device_kind):
        if side == "tessera":
            step, shape, scalars = tessera_side(length)
        else:
            step, shape, scalars = splash_side(length, *blocks)
    compile_on(device, step, *[jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 4)

    # The schedules of each direction: an unfused backward pass has two.
    schedules: dict[str, list[InstructionSchedule]] = {}
    for name, program in kernel_programs(folder).items():
        for prefix, operands in scalars.items():
            if prefix in name:
                schedule = run_program(program, [np.asarray(operand) for operand in operands])
                is_forward = "forward" in name or "fwd" in name
                direction = "forward" if is_forward else "backward"
                schedules.setdefault(direction, []).append(schedule)
    return {name: _counts(name, found, length) for name, found in schedules.items()}


def _counts(
    direction: str, schedules: Sequence[InstructionSchedule], length: int
) -> dict[str, Any]:
    # Pairs of a query and a key that a causal mask leaves.
    pairs = HEADS * length * (length + 1) // 2
    useful = pairs * WIDTH * PRODUCTS[direction]
    cycles = sum(schedule.cycles for schedule in schedules)
    busy = sum(schedule.utilization("MXU") * schedule.cycles for schedule in schedules)
    longest = max(schedules, key=lambda schedule: schedule.cycles)
    return {
        "cycles": cycles,
        "cycles_per_mac": cycles / useful,
        "busy": busy / cycles,
        "steady": longest.main_loop_utilization("MXU"),
    }


if __name__ == "__main__":
    folder, side, chip, *sizes = sys.argv[1:]
    print(json.dumps(count(pathlib.Path(folder), side, chip, *map(int, sizes))))

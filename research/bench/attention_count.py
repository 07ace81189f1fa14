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

from research.bench.instruction_schedule import kernel_programs, run_program
from research.kernels.attention import AttentionMask, attention, tpu
from research.kernels.attention.tpu_backward import backward_tiles
from research.kernels.attention.tpu_forward import forward_tiles
from research.parallel.target import compiling_for
from research.scaling.topology import compile_on, tpu_devices

HEADS, WIDTH = 16, 128


def tessera_schedule(
    length: int,
) -> tuple[Callable[..., Any], tuple[int, ...], dict[str, Sequence[Any]]]:
    """Returns value and gradients, the shape of q, and the scalars that each kernel is handed
    beforehand.
    """
    mask = AttentionMask(causal=True)
    forward, backward = tpu.choose_blocks(WIDTH, 2, False, length, length)
    tiles = {
        "forward": forward_tiles(mask, length, length, forward),
        "backward": backward_tiles(mask, length, length, backward)[0],
    }

    def step(q: Any, k: Any, v: Any, g: Any) -> Any:
        out, pull = jax.vjp(
            lambda q, k, v: attention(q, k, v, mask=mask, implementation="tpu"), q, k, v
        )
        return out, pull(g)

    scalars = {
        f"tessera_attention_{name}": (plan.counts, plan.order) for name, plan in tiles.items()
    }
    return step, (1, length, HEADS, WIDTH), scalars


def splash_schedule(
    length: int, queries: int, keys: int, computed: int, fused: int
) -> tuple[Callable[..., Any], tuple[int, ...], dict[str, Sequence[Any]]]:
    """The same of JAX's splash attention."""
    apart = {} if fused else {"block_q_dq": queries, "block_kv_dq": keys}
    blocks = splash.BlockSizes(
        block_q=queries,
        block_kv=keys,
        block_kv_compute=computed,
        block_q_dkv=queries,
        block_kv_dkv=keys,
        block_kv_dkv_compute=computed,
        use_fused_bwd_kernel=bool(fused),
        **apart,
    )
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * HEADS)
    kernel = splash.make_splash_mha(mask, block_sizes=blocks, head_shards=1, q_seq_shards=1)

    def step(q: Any, k: Any, v: Any, g: Any) -> Any:
        out, pull = jax.vjp(kernel, q, k, v)
        return out, pull(g)

    infos = {
        "splash_mha_fwd": kernel.fwd_mask_info,
        "splash_mha_dkv": kernel.dkv_mask_info,
        "splash_mha_dq": kernel.dq_mask_info,
    }
    scalars = {
        name: [
            array
            for array in (info.data_next, info.block_mask, info.mask_next)
            if array is not None
        ]
        for name, info in infos.items()
        if info is not None
    }
    return step, (HEADS, length, WIDTH), scalars


def count(folder: pathlib.Path, side: str, chip: str, length: int, *blocks: int) -> dict[str, Any]:
    """Returns cycles, cycles a useful multiply-add and how full the matrix units are, forward and
    backward.
    """
    device = tpu_devices(chip)[0]
    with compiling_for("tpu", device.device_kind):
        step, shape, scalars = (
            tessera_schedule(length) if side == "tessera" else splash_schedule(length, *blocks)
        )
    compile_on(device, step, *[jax.ShapeDtypeStruct(shape, jnp.bfloat16)] * 4)
    found: dict[str, Any] = {}
    for name, program in kernel_programs(folder).items():
        for prefix, operands in scalars.items():
            if prefix in name:
                schedule = run_program(program, [np.asarray(operand) for operand in operands])
                part = "forward" if "forward" in name or "fwd" in name else "backward"
                found.setdefault(part, []).append(schedule)
    pairs = HEADS * length * (length + 1) // 2
    return {
        part: {
            "cycles": sum(one.cycles for one in schedules),
            "cycles_per_mac": sum(one.cycles for one in schedules)
            / (pairs * WIDTH * (2 if part == "forward" else 5)),
            "busy": sum(one.busy("MXU") * one.cycles for one in schedules)
            / sum(one.cycles for one in schedules),
            "steady": max(schedules, key=lambda one: one.cycles).steady("MXU"),
        }
        for part, schedules in found.items()
    }


if __name__ == "__main__":
    folder, side, chip, *sizes = sys.argv[1:]
    print(json.dumps(count(pathlib.Path(folder), side, chip, *map(int, sizes))))

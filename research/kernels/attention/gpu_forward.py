"""The forward kernel of attention on Hopper GPUs.

A block holds 128 queries of a head, 64 a warpgroup, and visits the blocks of keys that its mask
leaves. A third warpgroup copies keys and values into a ring of buffers. The two that compute take
turns: while one has the tensor cores the other computes its softmax. The division by the
    denominator comes last.

Source: Shah et al. 2024 (FlashAttention-3), arXiv:2407.08608, section 3.1, without its pipelining
    inside a warpgroup.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from research.kernels.attention.gpu_plan import ROWS, TILE, WARPGROUPS, Plan, visits
from research.kernels.attention.gpu_tile import (
    HIDDEN,
    LOG2E,
    Tile,
    along,
    arrange_schedule,
    feed,
    launch,
    product,
    scores,
    spread,
    store,
    swizzled,
    zeros,
)

STAGES = 2


def key_block(width: int) -> int:
    """Returns how many keys a step takes: what registers and shared memory hold beside the
    result.
    """
    return 128 if width <= 128 else 64


def forward(
    plan: Plan,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    extras: dict[str, Array],
    kinds: Int[Array, "C I J"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns the result, and the log₂ of the denominator, infinite where a query sees nothing.

    Args:
      plan: the static plan.
      q, k, v: padded by `pad_tokens`.
      extras: of `gpu_plan.extras`.
      kinds: of `gpu_plan.block_kinds`, with `TILE` queries and `key_block` keys a block.
    """
    batch, queries, heads, width = q.shape
    block = key_block(width)
    order, counts = visits(kinds)
    scratch = {
        "q_smem": swizzled((WARPGROUPS, ROWS, width), q.dtype),
        "k_smem": swizzled((STAGES, block, width), k.dtype),
        "v_smem": swizzled((STAGES, block, width), v.dtype),
        "log_smem": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=WARPGROUPS),
        "k_full": plgpu.Barrier(num_barriers=STAGES),
        "v_full": plgpu.Barrier(num_barriers=STAGES),
        "k_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        "v_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
        "turns": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }
    out_type = [
        jax.ShapeDtypeStruct(q.shape, v.dtype),
        jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    ]
    body = functools.partial(_forward_block, plan, tuple(extras))
    kernel = launch(plan, body, out_type, scratch, head=heads, tile=queries // TILE, batch=batch)
    out, log_total = kernel(q, k, v, order, counts, *extras.values())
    return out, log_total


def _forward_block(
    plan: Plan,
    names: tuple[str, ...],
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    *refs: Any,
    **scratch: Any,
) -> None:
    order_ref, counts_ref, *given, out_ref, log_ref = refs
    batch, head = lax.axis_index("batch"), lax.axis_index("head")
    # Late tiles of a causal mask have the most to do: they start first.
    tile = order_ref.shape[1] - 1 - lax.axis_index("tile")
    which = (batch if order_ref.shape[0] > 1 else 0, tile)
    whole, total = counts_ref[(*which, 0)], counts_ref[(*which, 1)]

    def visit(step: Array) -> Array:
        return order_ref[(*which, step)] * scratch["k_smem"].shape[1]

    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        extras = dict(zip(names, given, strict=True))
        out, log_total = _compute(
            plan, extras, q_ref, (batch, tile, head), visit, (whole, total), scratch
        )
        row = tile * TILE + warpgroup * ROWS
        store(
            out.astype(out_ref.dtype),
            scratch["q_smem"].at[warpgroup],
            out_ref.at[batch, pl.ds(row, ROWS), head],
        )
        store(
            log_total, scratch["log_smem"].at[warpgroup], log_ref.at[batch, head, pl.ds(row, ROWS)]
        )

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        kv_head = lax.div(head, jnp.int32(plan.group))

        def copy(step: Array, slot: Array) -> None:
            part = (batch, pl.ds(visit(step), scratch["k_smem"].shape[1]), kv_head)
            plgpu.copy_gmem_to_smem(
                k_ref.at[part], scratch["k_smem"].at[slot], scratch["k_full"].at[slot]
            )
            plgpu.copy_gmem_to_smem(
                v_ref.at[part], scratch["v_smem"].at[slot], scratch["v_full"].at[slot]
            )

        feed(total, STAGES, (scratch["k_free"], scratch["v_free"]), copy)


def _compute(
    plan: Plan, extras: dict, q_ref: Any, at: tuple, visit: Any, counts: tuple, scratch: dict
) -> tuple[Float[Array, "M H"], Float[Array, "M"]]:
    """Returns the result of a warpgroup's queries, and the log₂ of their denominators."""
    (batch, tile, head), (whole, total) = at, counts
    warpgroup = lax.axis_index("warpgroup")
    row = tile * TILE + warpgroup * ROWS
    width, turns = q_ref.shape[-1], scratch["turns"]
    q_smem = scratch["q_smem"].at[warpgroup]
    plgpu.copy_gmem_to_smem(
        q_ref.at[batch, pl.ds(row, ROWS), head], q_smem, scratch["q_full"].at[warpgroup]
    )
    plgpu.barrier_wait(scratch["q_full"].at[warpgroup])

    top = spread(plan, jnp.full((ROWS,), HIDDEN / 2, jnp.float32), axis=0)
    denominator = zeros(plan, ROWS, axis=0)
    if "sinks" in extras:
        # A sink is a score whose value is zero: the sums start with it.
        top, denominator = denominator + extras["sinks"][head] * LOG2E, denominator + 1.0
    start = (zeros(plan, ROWS, width), top, denominator)

    def step(index: Array, carry: tuple, masked: bool) -> tuple:
        out, top, denominator = carry
        slot = lax.rem(index, jnp.int32(STAGES))
        k_smem, v_smem = scratch["k_smem"].at[slot], scratch["v_smem"].at[slot]
        plgpu.barrier_wait(scratch["k_full"].at[slot])
        raw = product(
            plan, q_smem, k_smem, transpose_b=True, meanwhile=lambda: arrange_schedule(turns)
        )
        plgpu.barrier_arrive(scratch["k_free"].at[slot])
        s, _ = scores(
            plan, extras, raw, Tile(batch, head, row, visit(index), raw.shape), masked=masked
        )
        new_top = jnp.maximum(top, jnp.max(s, axis=1))
        weights = jnp.exp2(s - along(new_top, 0, s.shape))
        shrink = jnp.exp2(top - new_top)
        denominator = denominator * shrink + jnp.sum(weights, axis=1)
        out *= along(shrink, 0, out.shape)
        narrow = weights.astype(v_smem.dtype)
        # Without it the compiler moves the softmax past the barriers into the other warpgroup's
        # turn.
        out, new_top, denominator, narrow = lax.optimization_barrier(
            (out, new_top, denominator, narrow)
        )
        plgpu.barrier_arrive(turns)
        plgpu.barrier_wait(scratch["v_full"].at[slot])
        plgpu.barrier_wait(turns)
        out = product(plan, narrow, v_smem, out)
        plgpu.barrier_arrive(scratch["v_free"].at[slot])
        return out, new_top, denominator

    pl.when(warpgroup == 1)(lambda: arrange_schedule(turns))
    carry = lax.fori_loop(0, whole, functools.partial(step, masked=False), start)
    out, top, denominator = lax.fori_loop(whole, total, functools.partial(step, masked=True), carry)
    pl.when(warpgroup == 0)(lambda: arrange_schedule(turns))

    seen = denominator > 0
    safe = jnp.where(seen, denominator, 1.0)
    log_total = jnp.where(seen, top + jnp.log(safe) * LOG2E, jnp.inf)
    return out * along(1.0 / safe, 0, out.shape), log_total

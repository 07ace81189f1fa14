"""The backward kernels of attention on Hopper GPUs.

They compute the scores of a tile again from the log of the denominator. One kernel holds a block of
queries and visits keys, for the gradient of the queries; one holds a block of keys and visits the
queries of all heads of the group, for those of keys and values, so that no gradient needs an atomic
addition; and one holds a tile of a bias and visits the sequences and heads that share it.

Source: Dao 2023 (FlashAttention-2), arXiv:2307.08691, algorithm 2.
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
    Tile,
    along,
    feed,
    launch,
    load,
    product,
    scores,
    store,
    swizzled,
    zeros,
)

# Keys, or queries, a step.
STEP = 64


def _stages(width: int) -> int:
    """Returns how many steps' operands shared memory holds beside the block's own."""
    return 2 if width <= 192 else 1


def _barriers(stages: int, names: tuple[str, ...], own: tuple[str, ...]) -> dict[str, Any]:
    """Returns the barriers of the operands that are copied in a ring, and of those that a warpgroup
    holds.
    """
    full = {f"{name}_full": plgpu.Barrier(num_barriers=stages) for name in names}
    free = {
        f"{name}_free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages)
        for name in names
    }
    return full | free | {f"{name}_full": plgpu.Barrier(num_barriers=WARPGROUPS) for name in own}


def _weights(
    plan: Plan,
    extras: dict,
    raw: Array,
    dweights: Array,
    statistics: tuple,
    tile: Tile,
    masked: bool,
) -> tuple[Array, Array, Array]:
    """Returns the weights of a tile, the gradient of its scores, and that of its scores before the
    cap.
    """
    s, slope = scores(plan, extras, raw, tile, masked=masked)
    log_total, delta = (along(x, tile.query_axis, s.shape) for x in statistics)
    weights = jnp.exp2(s - log_total)
    dscores = weights * (dweights - delta)
    return weights, dscores, dscores if slope is None else dscores * slope


def _statistics(plan: Plan, refs: tuple, tile: Tile) -> tuple[Array, ...]:
    """Loads the log of the denominator and delta of a tile's queries."""
    axis = tile.query_axis
    index = (tile.batch, tile.head, pl.ds(tile.query, tile.shape[axis]))
    return tuple(load(plan, ref, index, axis) for ref in refs)


def query_gradient(
    plan: Plan, operands: tuple[Array, ...], extras: dict[str, Array], kinds: Int[Array, "C I J"]
) -> Float[Array, "B T N H"]:
    """Returns the gradient of the queries.

    Args:
      plan: the static plan.
      operands: q, k, v, the gradient of the result (all padded by `pad_tokens`), the log₂ of the
          denominator and delta.
      extras: of `gpu_plan.extras`.
      kinds: of `gpu_plan.block_kinds`, with `TILE` queries and `STEP` keys a block.
    """
    q = operands[0]
    batch, queries, heads, width = q.shape
    stages = _stages(width)
    scratch = {f"{name}_smem": swizzled((WARPGROUPS, ROWS, width), q.dtype) for name in "qg"}
    scratch |= {f"{name}_smem": swizzled((stages, STEP, width), q.dtype) for name in "kv"}
    scratch |= _barriers(stages, ("k", "v"), ("q", "g"))
    body = functools.partial(_query_block, plan, tuple(extras))
    out_type = jax.ShapeDtypeStruct(q.shape, q.dtype)
    kernel = launch(plan, body, out_type, scratch, head=heads, tile=queries // TILE, batch=batch)
    return kernel(*operands, *visits(kinds), *extras.values())


def _query_block(plan: Plan, names: tuple[str, ...], *refs: Any, **scratch: Any) -> None:
    q_ref, k_ref, v_ref, g_ref, log_ref, delta_ref, order_ref, counts_ref, *given, dq_ref = refs
    extras = dict(zip(names, given, strict=True))
    batch, head, warpgroup = (lax.axis_index(name) for name in ("batch", "head", "warpgroup"))
    tile = order_ref.shape[1] - 1 - lax.axis_index("tile")
    which = (batch if order_ref.shape[0] > 1 else 0, tile)
    whole, total = counts_ref[(*which, 0)], counts_ref[(*which, 1)]
    stages, block, width = scratch["k_smem"].shape
    row = tile * TILE + warpgroup * ROWS
    rows = (batch, pl.ds(row, ROWS), head)

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        q_smem, g_smem = scratch["q_smem"].at[warpgroup], scratch["g_smem"].at[warpgroup]
        plgpu.copy_gmem_to_smem(q_ref.at[rows], q_smem, scratch["q_full"].at[warpgroup])
        plgpu.copy_gmem_to_smem(g_ref.at[rows], g_smem, scratch["g_full"].at[warpgroup])
        plgpu.barrier_wait(scratch["q_full"].at[warpgroup])
        plgpu.barrier_wait(scratch["g_full"].at[warpgroup])
        own = Tile(batch, head, row, jnp.int32(0), (ROWS, block))
        statistics = _statistics(plan, (log_ref, delta_ref), own)

        def step(index: Array, dq: Array, masked: bool) -> Array:
            slot = lax.rem(index, jnp.int32(stages))
            k_smem, v_smem = scratch["k_smem"].at[slot], scratch["v_smem"].at[slot]
            plgpu.barrier_wait(scratch["k_full"].at[slot])
            raw = product(plan, q_smem, k_smem, transpose_b=True)
            plgpu.barrier_wait(scratch["v_full"].at[slot])
            dweights = product(plan, g_smem, v_smem, transpose_b=True)
            plgpu.barrier_arrive(scratch["v_free"].at[slot])
            here = Tile(batch, head, row, order_ref[(*which, index)] * block, own.shape)
            _, _, draw = _weights(plan, extras, raw, dweights, statistics, here, masked)
            dq = product(plan, draw.astype(k_smem.dtype), k_smem, dq)
            plgpu.barrier_arrive(scratch["k_free"].at[slot])
            return dq

        dq = lax.fori_loop(
            0, whole, functools.partial(step, masked=False), zeros(plan, ROWS, width)
        )
        dq = lax.fori_loop(whole, total, functools.partial(step, masked=True), dq)
        store((dq * plan.scale).astype(dq_ref.dtype), q_smem, dq_ref.at[rows])

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def copy(step: Array, slot: Array) -> None:
            part = (
                batch,
                pl.ds(order_ref[(*which, step)] * block, block),
                lax.div(head, jnp.int32(plan.group)),
            )
            plgpu.copy_gmem_to_smem(
                k_ref.at[part], scratch["k_smem"].at[slot], scratch["k_full"].at[slot]
            )
            plgpu.copy_gmem_to_smem(
                v_ref.at[part], scratch["v_smem"].at[slot], scratch["v_full"].at[slot]
            )

        feed(total, stages, (scratch["k_free"], scratch["v_free"]), copy)


def key_gradients(
    plan: Plan,
    operands: tuple[Array, ...],
    extras: dict[str, Array],
    kinds: Int[Array, "C I J"],
    wanted: tuple[str, ...],
) -> tuple[Array, ...]:
    """Returns what is wanted of the gradients of the keys, `dk`, of the values, `dv`, and of a bias
    a key, `dbias`.

    The last one is `[B, N, S]` in float32, a sum over the queries. It comes with `dk` only.

    Args:
      plan: the static plan.
      operands: as those of `query_gradient`.
      extras: of `gpu_plan.extras`, with the bias transposed to `[B, N, S, T]`.
      kinds: of `gpu_plan.block_kinds`, with `STEP` queries and `TILE` keys a block.
      wanted: names. At head widths whose two sums do not fit in the registers, ask for one at a
          time.
    """
    q, k = operands[:2]
    batch, keys, kv_heads, width = k.shape
    stages = _stages(width)
    scratch = {f"{name}_smem": swizzled((WARPGROUPS, ROWS, width), q.dtype) for name in "kv"}
    scratch |= {f"{name}_smem": swizzled((stages, STEP, width), q.dtype) for name in "qg"}
    scratch |= {"sum_smem": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)}
    scratch |= _barriers(stages, ("q", "g"), ("k", "v"))
    tokens = jax.ShapeDtypeStruct(k.shape, k.dtype)
    types = {
        "dk": tokens,
        "dv": tokens,
        "dbias": jax.ShapeDtypeStruct((batch, q.shape[2], keys), jnp.float32),
    }
    body = functools.partial(_key_block, plan, tuple(extras), wanted)
    out_type = [types[name] for name in wanted]
    kernel = launch(plan, body, out_type, scratch, head=kv_heads, tile=keys // TILE, batch=batch)
    return tuple(kernel(*operands, *visits(jnp.swapaxes(kinds, 1, 2)), *extras.values()))


def _key_block(
    plan: Plan, names: tuple[str, ...], wanted: tuple[str, ...], *refs: Any, **scratch: Any
) -> None:
    q_ref, k_ref, v_ref, g_ref, log_ref, delta_ref, order_ref, counts_ref, *rest = refs
    extras = dict(zip(names, rest[: len(names)], strict=True))
    outs = dict(zip(wanted, rest[len(names) :], strict=True))
    batch, kv_head, tile, warpgroup = (
        lax.axis_index(name) for name in ("batch", "head", "tile", "warpgroup")
    )
    which = (batch if order_ref.shape[0] > 1 else 0, tile)
    counts = counts_ref[(*which, 0)], counts_ref[(*which, 1)]
    stages, block = scratch["q_smem"].shape[:2]
    column = tile * TILE + warpgroup * ROWS
    columns = (batch, pl.ds(column, ROWS), kv_head)

    def visit(step: Array) -> Array:
        return order_ref[(*which, step)] * block

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        for name, ref in (("k", k_ref), ("v", v_ref)):
            full = scratch[f"{name}_full"].at[warpgroup]
            plgpu.copy_gmem_to_smem(ref.at[columns], scratch[f"{name}_smem"].at[warpgroup], full)
            plgpu.barrier_wait(full)
        at = (batch, kv_head, column)
        sums = _key_sums(plan, extras, (log_ref, delta_ref), at, visit, counts, outs, scratch)
        if "dk" in wanted:
            dk = (sums["dk"] * plan.scale).astype(outs["dk"].dtype)
            store(dk, scratch["k_smem"].at[warpgroup], outs["dk"].at[columns])
        if "dv" in wanted:
            store(
                sums["dv"].astype(outs["dv"].dtype),
                scratch["v_smem"].at[warpgroup],
                outs["dv"].at[columns],
            )

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")
        total = counts[1]

        def copy(step: Array, slot: Array) -> None:
            head = kv_head * plan.group + lax.div(step, total)
            part = (batch, pl.ds(visit(lax.rem(step, total)), block), head)
            plgpu.copy_gmem_to_smem(
                q_ref.at[part], scratch["q_smem"].at[slot], scratch["q_full"].at[slot]
            )
            plgpu.copy_gmem_to_smem(
                g_ref.at[part], scratch["g_smem"].at[slot], scratch["g_full"].at[slot]
            )

        feed(total * plan.group, stages, (scratch["q_free"], scratch["g_free"]), copy)


def _key_sums(
    plan: Plan,
    extras: dict,
    statistics: tuple,
    at: tuple,
    visit: Any,
    counts: tuple,
    outs: dict,
    scratch: dict,
) -> dict[str, Array]:
    """Returns the gradients of a warpgroup's keys and values; writes that of a bias a key for every
    head.
    """
    (batch, kv_head, column), (whole, total) = at, counts
    warpgroup = lax.axis_index("warpgroup")
    k_smem, v_smem = scratch["k_smem"].at[warpgroup], scratch["v_smem"].at[warpgroup]
    stages, block, width = scratch["q_smem"].shape

    def step(index: Array, sums: dict, group: Array, masked: bool) -> dict:
        slot = lax.rem(group * total + index, jnp.int32(stages))
        q_smem, g_smem = scratch["q_smem"].at[slot], scratch["g_smem"].at[slot]
        here = Tile(
            batch,
            kv_head * plan.group + group,
            visit(index),
            column,
            (ROWS, block),
            transposed=True,
        )
        plgpu.barrier_wait(scratch["q_full"].at[slot])
        raw = product(plan, k_smem, q_smem, transpose_b=True)
        plgpu.barrier_wait(scratch["g_full"].at[slot])
        # The values' gradient does not ask for it, and no compiler leaves a matmul of the tensor
        # cores out.
        asked = "dk" in outs
        dweights = (
            product(plan, v_smem, g_smem, transpose_b=True) if asked else zeros(plan, ROWS, block)
        )
        own = _statistics(plan, statistics, here)
        weights, dscores, draw = _weights(plan, extras, raw, dweights, own, here, masked)
        sums = dict(sums)
        if "dv" in sums:
            sums["dv"] = product(plan, weights.astype(g_smem.dtype), g_smem, sums["dv"])
        plgpu.barrier_arrive(scratch["g_free"].at[slot])
        if "dbias" in sums:
            sums["dbias"] += jnp.sum(dscores, axis=1)
        if "dk" in sums:
            sums["dk"] = product(plan, draw.astype(q_smem.dtype), q_smem, sums["dk"])
        plgpu.barrier_arrive(scratch["q_free"].at[slot])
        return sums

    def of_head(group: Array, sums: dict) -> dict:
        if "dbias" in outs:
            sums = {**sums, "dbias": zeros(plan, ROWS, axis=0)}
        sums = lax.fori_loop(0, whole, functools.partial(step, group=group, masked=False), sums)
        sums = lax.fori_loop(whole, total, functools.partial(step, group=group, masked=True), sums)
        if "dbias" in outs:
            target = outs["dbias"].at[batch, kv_head * plan.group + group, pl.ds(column, ROWS)]
            store(sums["dbias"], scratch["sum_smem"].at[warpgroup], target)
        return {name: x for name, x in sums.items() if name != "dbias"}

    start = {name: zeros(plan, ROWS, width) for name in ("dk", "dv") if name in outs}
    return lax.fori_loop(0, plan.group, of_head, start)


def bias_gradient(
    plan: Plan,
    operands: tuple[Array, ...],
    extras: dict[str, Array],
    kinds: Int[Array, "C I J"],
    shared: tuple[int, int],
) -> Float[Array, "C M T S"]:
    """Returns the gradient of a bias for every query and key, in float32, summed over what shares
    it.

    Args:
      plan: the static plan.
      operands: as those of `query_gradient`.
      extras: of `gpu_plan.extras`.
      kinds: of `gpu_plan.block_kinds`, with `TILE` queries and `ROWS` keys a block.
      shared: the sequences and the heads of the bias, B or 1 and N or 1.
    """
    q, k = operands[:2]
    queries, width, keys = q.shape[1], q.shape[3], k.shape[1]
    # Four operands a step: only narrow heads leave room for two of them.
    stages = 2 if width <= 128 else 1
    scratch = {
        f"{name}_smem": swizzled((stages, WARPGROUPS, ROWS, width), q.dtype) for name in "qg"
    }
    scratch |= {f"{name}_smem": swizzled((stages, ROWS, width), q.dtype) for name in "kv"}
    scratch |= {
        "out_smem": swizzled((WARPGROUPS, ROWS, ROWS), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=2 * WARPGROUPS + 2, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    }
    active = jnp.any(kinds < 2, axis=0).astype(jnp.int32)
    body = functools.partial(_bias_block, plan, tuple(extras))
    out_type = jax.ShapeDtypeStruct((*shared, queries, keys), jnp.float32)
    grid = {"keys": keys // ROWS, "tile": queries // TILE, "pair": shared[0] * shared[1]}
    return launch(plan, body, out_type, scratch, **grid)(*operands, active, *extras.values())


def _bias_block(plan: Plan, names: tuple[str, ...], *refs: Any, **scratch: Any) -> None:
    q_ref, k_ref, v_ref, g_ref, log_ref, delta_ref, active_ref, *given, out_ref = refs
    extras = dict(zip(names, given, strict=True))
    keys, tile, pair, warpgroup = (
        lax.axis_index(name) for name in ("keys", "tile", "pair", "warpgroup")
    )
    batches, heads = out_ref.shape[:2]
    own_batch, own_head = lax.div(pair, jnp.int32(heads)), lax.rem(pair, jnp.int32(heads))
    sharing_heads = q_ref.shape[2] if heads == 1 else 1
    sharing = sharing_heads * (q_ref.shape[0] if batches == 1 else 1)
    total = sharing * active_ref[tile, keys]
    stages, column = scratch["k_smem"].shape[0], keys * ROWS

    def member(step: Array) -> tuple[Array, Array]:
        batch = lax.div(step, jnp.int32(sharing_heads)) if batches == 1 else own_batch
        return batch, lax.rem(step, jnp.int32(sharing_heads)) if heads == 1 else own_head

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        row = tile * TILE + warpgroup * ROWS

        def step(index: Array, dbias: Array) -> Array:
            slot = lax.rem(index, jnp.int32(stages))
            here = Tile(*member(index), row, column, (ROWS, ROWS))
            plgpu.barrier_wait(scratch["full"].at[slot])
            q_smem, g_smem = (
                scratch["q_smem"].at[slot, warpgroup],
                scratch["g_smem"].at[slot, warpgroup],
            )
            raw = product(plan, q_smem, scratch["k_smem"].at[slot], transpose_b=True)
            dweights = product(plan, g_smem, scratch["v_smem"].at[slot], transpose_b=True)
            plgpu.barrier_arrive(scratch["free"].at[slot])
            own = _statistics(plan, (log_ref, delta_ref), here)
            return dbias + _weights(plan, extras, raw, dweights, own, here, True)[1]

        dbias = lax.fori_loop(0, total, step, zeros(plan, ROWS, ROWS))
        target = out_ref.at[own_batch, own_head, pl.ds(row, ROWS), pl.ds(column, ROWS)]
        store(dbias, scratch["out_smem"].at[warpgroup], target)

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def copy(step: Array, slot: Array) -> None:
            batch, head = member(step)
            full = scratch["full"].at[slot]
            for name, ref in (("q", q_ref), ("g", g_ref)):
                for half in range(WARPGROUPS):
                    part = (batch, pl.ds(tile * TILE + half * ROWS, ROWS), head)
                    plgpu.copy_gmem_to_smem(
                        ref.at[part], scratch[f"{name}_smem"].at[slot, half], full
                    )
            part = (batch, pl.ds(column, ROWS), lax.div(head, jnp.int32(plan.group)))
            for name, ref in (("k", k_ref), ("v", v_ref)):
                plgpu.copy_gmem_to_smem(ref.at[part], scratch[f"{name}_smem"].at[slot], full)

        feed(total, stages, (scratch["free"],), copy)

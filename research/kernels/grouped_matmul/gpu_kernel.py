"""The kernels of the grouped matmul for Hopper GPUs: rows times the kernel of their group, and
outer products.

A block makes one tile of a result and adds up the products of steps of the axis that is contracted.
Two warpgroups make half of its rows each. A third one copies the operands of both into a ring of
shared memory, as many steps ahead as there is room.

Tiles of rows begin at whole tiles and not at groups, since the copy engine wants them so. A tile
with rows of several groups is made once for each of them, and each time only the rows of that group
are stored. Outer products sum over
rows: there the rows of other groups are made zero after they are copied, by the warpgroup that
    copies.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from research.kernels.attention.gpu_plan import ROWS, TILE, WARPGROUPS
from research.kernels.attention.gpu_tile import feed, load, product, spread, store, swizzled, zeros

# What is contracted in a step; how many of them shared memory holds.
STEP, STAGES = 64, 4
# Registers of a thread of each warpgroup, together.
REGISTERS = 504
# Columns that are stored at a time.
CHUNK = 64
# Copies of a step: the rows of each warpgroup, and what both multiply them with.
COPIES = WARPGROUPS + 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when a kernel is traced.

    Attributes:
      columns: of a tile of the result.
      transposed: whether rows are multiplied with the transposed kernels.
      interpret: run on the CPU by JAX's interpreter of GPU kernels.
    """

    columns: int
    transposed: bool
    interpret: bool


def scratch(plan: Plan, dtype: Any, out_dtype: Any) -> dict[str, Any]:
    """Returns the shared memory of a block, and its barriers.

    Args:
      plan: the static plan.
      dtype: of the operands.
      out_dtype: of the result.
    """
    right = (plan.columns, STEP) if plan.transposed else (STEP, plan.columns)
    return {
        "left": swizzled((STAGES, WARPGROUPS, ROWS, STEP), dtype),
        "right": swizzled((STAGES, *right), dtype),
        "out": swizzled((WARPGROUPS, ROWS, CHUNK), out_dtype),
        "full": plgpu.Barrier(num_arrivals=COPIES, num_barriers=STAGES),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
    }


def rows_scratch(plan: Plan, dtype: Any) -> dict[str, Any]:
    """Returns what `grouped_rows` shares beside `scratch`: a buffer of which any rows may be
    copied.
    """
    return scratch(plan, dtype, dtype) | {"rows": plgpu.SMEM((WARPGROUPS, ROWS, CHUNK), dtype)}


def outer_scratch(plan: Plan, dtype: Any) -> dict[str, Any]:
    """Returns what `grouped_outer` shares beside `scratch`: the barrier of the steps that have rows
    of other groups.
    """
    return scratch(plan, dtype, jnp.float32) | {"edge": plgpu.Barrier(num_arrivals=COPIES)}


def _work(
    plan: Plan,
    shared: dict[str, Any],
    total: Array,
    copy: Callable[[Array, Array], None],
    finish: Callable[[Array], None],
    *,
    transpose_a: bool = False,
    copying_registers: int = 40,
) -> None:
    """Sums the products of all steps in the warpgroups that compute, while the other one copies.

    Args:
      plan: the static plan.
      shared: of `scratch`.
      total: how many steps.
      copy: starts the copies of a step into a slot of the ring.
      finish: stores the sum of a warpgroup.
      transpose_a: whether the left operands are read transposed.
      copying_registers: of a thread that copies; those that compute share the rest.
    """
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers((REGISTERS - copying_registers) // WARPGROUPS, action="increase")

        def step(index: Array, out: Array) -> Array:
            slot = lax.rem(index, jnp.int32(STAGES))
            left, right = shared["left"].at[slot, warpgroup], shared["right"].at[slot]
            plgpu.barrier_wait(shared["full"].at[slot])
            out = product(
                plan, left, right, out, transpose_a=transpose_a, transpose_b=plan.transposed
            )
            plgpu.barrier_arrive(shared["free"].at[slot])
            return out

        finish(lax.fori_loop(0, total, step, zeros(plan, ROWS, plan.columns)))

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(copying_registers, action="decrease")
        feed(total, STAGES, (shared["free"],), copy)


def _chunks(out: Array, column: Array) -> list[tuple[Array, pl.Slice]]:
    """Returns the columns of a sum in pieces, and where they go."""
    rows, columns = out.shape
    starts = range(0, columns, CHUNK)
    return [
        (lax.slice(out, (0, at), (rows, at + CHUNK)), pl.ds(column + at, CHUNK)) for at in starts
    ]


def grouped_rows(
    plan: Plan, visits_ref: Any, x_ref: Any, kernels_ref: Any, y_ref: Any, **shared: Any
) -> None:
    """Computes the rows of one group in one tile: see `gpu.visit_table` for what it reads of its
    visit.
    """
    visit, warpgroup = lax.axis_index("visit"), lax.axis_index("warpgroup")
    group, tile, start, stop, total = (visits_ref[visit, n] for n in range(5))
    column = _column(plan)

    def copy(step: Array, slot: Array) -> None:
        full, inner = shared["full"].at[slot], pl.ds(step * STEP, STEP)
        for half in range(WARPGROUPS):
            rows = pl.ds(tile * TILE + half * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(x_ref.at[rows, inner], shared["left"].at[slot, half], full)
        outer = pl.ds(column, plan.columns)
        part = (group, outer, inner) if plan.transposed else (group, inner, outer)
        plgpu.copy_gmem_to_smem(kernels_ref.at[part], shared["right"].at[slot], full)

    def finish(out: Float[Array, "M P"]) -> None:
        first = tile * TILE + warpgroup * ROWS
        begin, end = (jnp.clip(row - first, 0, ROWS) for row in (start, stop))
        chunks = _chunks(out.astype(y_ref.dtype), column)

        @pl.when(end - begin == ROWS)
        def _() -> None:
            for part, columns in chunks:
                store(part, shared["out"].at[warpgroup], y_ref.at[pl.ds(first, ROWS), columns])

        @pl.when((begin < end) & (end - begin < ROWS))
        def _() -> None:
            for part, columns in chunks:
                _store_rows(part, shared["rows"].at[warpgroup], y_ref, (first, columns), begin, end)

    _work(plan, shared, total, copy, finish)


def _column(plan: Plan) -> Array:
    """Returns the first column of a block's tile."""
    band = lax.axis_index("band") * lax.axis_size("column") + lax.axis_index("column")
    return band * plan.columns


def _store_rows(
    value: Array, buffer: Any, target: Any, at: tuple[Array, pl.Slice], begin: Array, end: Array
) -> None:
    """Writes some rows of a tile to device memory through shared memory, which is free when it
    returns.

    The copy engine copies as many rows as was known when it was compiled: here the powers of two
    that add up to them.

    Args:
      value: the tile.
      buffer: shared memory for it.
      target: the array.
      at: the tile's first row in it, and its columns.
      begin, end: the rows of the tile, not all of them.
    """
    first, columns = at
    buffer[...] = value
    plgpu.commit_smem()
    size = ROWS // 2
    while size:
        some = (end - begin) & size

        @pl.when(some != 0)
        def _(size: int = size, begin: Array = begin) -> None:
            plgpu.copy_smem_to_gmem(
                buffer.at[pl.ds(begin, size)], target.at[pl.ds(first + begin, size), columns]
            )

        begin, size = begin + some, size // 2
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def grouped_outer(
    plan: Plan, spans_ref: Any, x_ref: Any, g_ref: Any, out_ref: Any, **shared: Any
) -> None:
    """Computes a tile of xᵀ g of one group, from the first row of the group and the one after its
    last.
    """
    group, warpgroup = lax.axis_index("group"), lax.axis_index("warpgroup")
    start, stop = spans_ref[group, 0], spans_ref[group, 1]
    first = lax.div(start, jnp.int32(STEP))
    total = jnp.where(stop > start, lax.div(stop + (STEP - 1), jnp.int32(STEP)) - first, 0)
    row, column = lax.axis_index("row") * TILE, _column(plan)

    def copy(step: Array, slot: Array) -> None:
        # The steps with rows of other groups come last, when there is enough to do until they are
        # clean.
        begin = (first + lax.rem(step + 1, total)) * STEP
        left, right = (
            [shared["left"].at[slot, half] for half in range(WARPGROUPS)],
            shared["right"].at[slot],
        )

        def copy_to(barrier: Any) -> None:
            rows = pl.ds(begin, STEP)
            for half, buffer in enumerate(left):
                plgpu.copy_gmem_to_smem(
                    x_ref.at[rows, pl.ds(row + half * ROWS, ROWS)], buffer, barrier
                )
            plgpu.copy_gmem_to_smem(g_ref.at[rows, pl.ds(column, plan.columns)], right, barrier)

        inside = (begin >= start) & (begin + STEP <= stop)
        pl.when(inside)(lambda: copy_to(shared["full"].at[slot]))

        @pl.when(jnp.logical_not(inside))
        def _() -> None:
            copy_to(shared["edge"])
            plgpu.barrier_wait(shared["edge"])
            for buffer in (
                *left,
                *(right.at[:, pl.ds(at, CHUNK)] for at in range(0, plan.columns, CHUNK)),
            ):
                _clear(plan, buffer, start - begin, stop - begin)
            plgpu.commit_smem()
            for _ in range(COPIES):
                plgpu.barrier_arrive(shared["full"].at[slot])

    def finish(out: Float[Array, "M P"]) -> None:
        for part, columns in _chunks(out, column):
            rows = pl.ds(row + warpgroup * ROWS, ROWS)
            store(part, shared["out"].at[warpgroup], out_ref.at[group, rows, columns])

    _work(plan, shared, total, copy, finish, transpose_a=True, copying_registers=72)


def _clear(plan: Plan, buffer: Any, start: Array, stop: Array) -> None:
    """Makes the rows of a buffer zero but for those from `start` to `stop`, whatever they hold."""
    x = load(plan, buffer, tuple(pl.ds(0, size) for size in buffer.shape))
    row = spread(plan, lax.broadcasted_iota(jnp.int32, buffer.shape, 0))
    mine = (row >= start) & (row < stop)
    buffer[...] = jnp.where(mine, x.astype(jnp.float32), 0.0).astype(x.dtype)

"""The kernels of the grouped matmul for Hopper GPUs: rows times the kernel of their group, and
outer products.

A block makes one tile of a result and adds up the products of steps of the axis that is contracted.
Two warpgroups make half of its rows each. A third one copies the operands of both into a ring of
shared memory, as many steps ahead as it has room for.

Tiles of rows begin at multiples of the tile size and not at groups, as the copy engine requires. A
tile with rows of several groups is made once for each of them, and each time only the rows of that
group are stored. Outer products sum over rows: the warpgroup that copies makes the rows of other
groups zero after they are copied.
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

# Elements that are contracted in a step, and the steps that the ring in shared memory holds.
STEP = 64
STAGES = 4
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
    # Each warpgroup has its own rows on the left, and all have the same columns on the right.
    right = (STEP, plan.columns)
    if plan.transposed:
        right = (plan.columns, STEP)
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
    rows = plgpu.SMEM((WARPGROUPS, ROWS, CHUNK), dtype)
    return scratch(plan, dtype, dtype) | {"rows": rows}


def outer_scratch(plan: Plan, dtype: Any) -> dict[str, Any]:
    """Returns what `grouped_outer` shares beside `scratch`: the barrier of the steps that have rows
    of other groups.
    """
    edge = plgpu.Barrier(num_arrivals=COPIES)
    return scratch(plan, dtype, jnp.float32) | {"edge": edge}


def _work(
    plan: Plan,
    shared: dict[str, Any],
    steps: Array,
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
      steps: how many.
      copy: starts the copies of a step into a slot of the ring.
      finish: stores the sum of a warpgroup.
      transpose_a: whether the left operands are read transposed.
      copying_registers: of a thread that copies; those that compute share the rest.
    """
    warpgroup = lax.axis_index("warpgroup")

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        computing_registers = (REGISTERS - copying_registers) // WARPGROUPS
        plgpu.set_max_registers(computing_registers, action="increase")

        def add_step(index: Array, out: Array) -> Array:
            # Step 5 is in slot 1 of a ring of 4.
            slot = lax.rem(index, jnp.int32(STAGES))
            left = shared["left"].at[slot, warpgroup]
            right = shared["right"].at[slot]
            full = shared["full"].at[slot]
            free = shared["free"].at[slot]
            plgpu.barrier_wait(full)
            out = product(
                plan, left, right, out, transpose_a=transpose_a, transpose_b=plan.transposed
            )
            plgpu.barrier_arrive(free)
            return out

        out = zeros(plan, ROWS, plan.columns)
        out = lax.fori_loop(0, steps, add_step, out)
        finish(out)

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(copying_registers, action="decrease")
        free = (shared["free"],)
        feed(steps, STAGES, free, copy)


def _chunks(out: Array, column: Array) -> list[tuple[Array, pl.Slice]]:
    """Returns a sum in chunks of columns, each with its columns of the result.

    Args:
      out: the sum.
      column: of the result, of the sum's first column.
    """
    rows, columns = out.shape
    chunks = []
    # 128 columns at 256 of the result -> columns 256:320 and 320:384
    for start in range(0, columns, CHUNK):
        end = start + CHUNK
        chunk = lax.slice(out, (0, start), (rows, end))
        target = pl.ds(column + start, CHUNK)
        chunks.append((chunk, target))
    return chunks


def grouped_rows(
    plan: Plan, visits_ref: Any, x_ref: Any, kernels_ref: Any, y_ref: Any, **shared: Any
) -> None:
    """Computes the rows of one group in one tile.

    Args:
      plan: the static plan.
      visits_ref: of `gpu.visit_table`.
      x_ref, kernels_ref: the operands.
      y_ref: the result.
      shared: of `rows_scratch`.
    """
    visit = lax.axis_index("visit")
    warpgroup = lax.axis_index("warpgroup")
    group = visits_ref[visit, 0]
    tile = visits_ref[visit, 1]
    start = visits_ref[visit, 2]
    stop = visits_ref[visit, 3]
    steps = visits_ref[visit, 4]
    column = _column(plan)

    def copy(step: Array, slot: Array) -> None:
        full = shared["full"].at[slot]
        inner = pl.ds(step * STEP, STEP)
        # The halves of tile 2 of 128 rows: rows 256:320 and 320:384
        for half in range(WARPGROUPS):
            first_row = tile * TILE + half * ROWS
            rows = pl.ds(first_row, ROWS)
            source = x_ref.at[rows, inner]
            left = shared["left"].at[slot, half]
            plgpu.copy_gmem_to_smem(source, left, full)

        outer = pl.ds(column, plan.columns)
        block = (group, inner, outer)
        if plan.transposed:
            block = (group, outer, inner)
        source = kernels_ref.at[block]
        right = shared["right"].at[slot]
        plgpu.copy_gmem_to_smem(source, right, full)

    def finish(out: Float[Array, "rows columns"]) -> None:
        # Of rows 256:320 the group may have 260:300: 4:44 of the warpgroup's rows.
        first = tile * TILE + warpgroup * ROWS
        begin = jnp.clip(start - first, 0, ROWS)
        end = jnp.clip(stop - first, 0, ROWS)
        out = out.astype(y_ref.dtype)
        chunks = _chunks(out, column)
        _store_members(shared, warpgroup, chunks, y_ref, first, begin, end)

    _work(plan, shared, steps, copy, finish)


def _store_members(
    shared: dict[str, Any],
    warpgroup: Array,
    chunks: list[tuple[Array, pl.Slice]],
    y_ref: Any,
    first: Array,
    begin: Array,
    end: Array,
) -> None:
    """Stores the rows that belong to the group, those from `begin` to `end`.

    Args:
      shared: of `rows_scratch`.
      warpgroup: index of the one that has the rows.
      chunks: of `_chunks`.
      y_ref: the result.
      first: row of the result, of the warpgroup's first row.
      begin, end: of the warpgroup's rows.
    """

    @pl.when(end - begin == ROWS)
    def _store_all() -> None:
        buffer = shared["out"].at[warpgroup]
        rows = pl.ds(first, ROWS)
        for chunk, columns in chunks:
            target = y_ref.at[rows, columns]
            store(chunk, buffer, target)

    @pl.when((begin < end) & (end - begin < ROWS))
    def _store_some() -> None:
        buffer = shared["rows"].at[warpgroup]
        for chunk, columns in chunks:
            _store_rows(chunk, buffer, y_ref, (first, columns), begin, end)


def _column(plan: Plan) -> Array:
    """Returns the first column of a block's tile."""
    # Tile 2 of band 3, with 4 tiles of 256 columns per band: tile 14, column 3,584
    first_tile = lax.axis_index("band") * lax.axis_size("column")
    tile = first_tile + lax.axis_index("column")
    return tile * plan.columns


def _store_rows(
    value: Array,
    buffer: Any,
    target: Any,
    position: tuple[Array, pl.Slice],
    begin: Array,
    end: Array,
) -> None:
    """Writes some rows of a tile to device memory through shared memory, which is free when it
    returns.

    The number of rows of a copy is static: here the powers of two that add up to the rows.

    Args:
      value: the tile.
      buffer: shared memory for it.
      target: the array.
      position: the tile's first row in the array, and its columns.
      begin, end: the rows of the tile, not all of them.
    """
    first, columns = position
    buffer[...] = value
    plgpu.commit_smem()

    # 40 rows are a copy of 32 and one of 8.
    size = ROWS // 2
    while size:
        copied = (end - begin) & size

        @pl.when(copied != 0)
        def _copy(size: int = size, begin: Array = begin) -> None:
            rows = buffer.at[pl.ds(begin, size)]
            target_rows = pl.ds(first + begin, size)
            place = target.at[target_rows, columns]
            plgpu.copy_smem_to_gmem(rows, place)

        begin = begin + copied
        size = size // 2
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def grouped_outer(
    plan: Plan, spans_ref: Any, x_ref: Any, g_ref: Any, out_ref: Any, **shared: Any
) -> None:
    """Computes a tile of xᵀ g of one group.

    Args:
      plan: the static plan.
      spans_ref: the first row of each group, and the row after its last.
      x_ref, g_ref, out_ref: operands and result.
      shared: of `outer_scratch`.
    """
    group = lax.axis_index("group")
    warpgroup = lax.axis_index("warpgroup")
    start = spans_ref[group, 0]
    stop = spans_ref[group, 1]

    first, steps = _steps(start, stop)
    row = lax.axis_index("row") * TILE
    column = _column(plan)

    def copy(step: Array, slot: Array) -> None:
        # Steps 2, 3, 4, 1: those with rows of other groups come last, when there is enough to do
        # until they are clean.
        begin = (first + lax.rem(step + 1, steps)) * STEP
        left = [shared["left"].at[slot, half] for half in range(WARPGROUPS)]
        right = shared["right"].at[slot]
        full = shared["full"].at[slot]

        def copy_to(barrier: Any) -> None:
            rows = pl.ds(begin, STEP)
            for half, buffer in enumerate(left):
                x_columns = pl.ds(row + half * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(x_ref.at[rows, x_columns], buffer, barrier)
            g_columns = pl.ds(column, plan.columns)
            plgpu.copy_gmem_to_smem(g_ref.at[rows, g_columns], right, barrier)

        is_inside = (begin >= start) & (begin + STEP <= stop)

        @pl.when(is_inside)
        def _copy_whole() -> None:
            copy_to(full)

        @pl.when(jnp.logical_not(is_inside))
        def _copy_and_clear() -> None:
            copy_to(shared["edge"])
            plgpu.barrier_wait(shared["edge"])
            buffers = left + _column_chunks(plan, right)
            _clear_outside(plan, buffers, start - begin, stop - begin)
            # In the place of the copies, which arrived at the other barrier.
            for _ in range(COPIES):
                plgpu.barrier_arrive(full)

    def finish(out: Float[Array, "rows columns"]) -> None:
        rows = pl.ds(row + warpgroup * ROWS, ROWS)
        buffer = shared["out"].at[warpgroup]
        for chunk, columns in _chunks(out, column):
            target = out_ref.at[group, rows, columns]
            store(chunk, buffer, target)

    _work(plan, shared, steps, copy, finish, transpose_a=True, copying_registers=72)


def _steps(start: Array, stop: Array) -> tuple[Array, Array]:
    """Returns the first step that has rows of a group, and how many there are."""
    # Rows 100:300 are in steps 1:5 of 64 rows: first 1, and 4 of them.
    step = jnp.int32(STEP)
    first = lax.div(start, step)
    has_rows = stop > start
    rounded_up = stop + (STEP - 1)
    after_last = lax.div(rounded_up, step)
    steps = jnp.where(has_rows, after_last - first, 0)
    return first, steps


def _column_chunks(plan: Plan, right: Any) -> list[Any]:
    """Returns chunks of the columns of a slot, each a reference."""
    # 128 columns -> 0:64 and 64:128
    chunks = []
    for start in range(0, plan.columns, CHUNK):
        columns = pl.ds(start, CHUNK)
        chunk = right.at[:, columns]
        chunks.append(chunk)
    return chunks


def _clear_outside(plan: Plan, buffers: list[Any], start: Array, stop: Array) -> None:
    """Makes the rows of buffers zero but for those from `start` to `stop`, whatever they hold."""
    for buffer in buffers:
        whole = tuple(pl.ds(0, size) for size in buffer.shape)
        x = load(plan, buffer, whole)
        row = lax.broadcasted_iota(jnp.int32, buffer.shape, 0)
        row = spread(plan, row)
        is_member = (row >= start) & (row < stop)
        # Selected and not multiplied: a row of another group may hold NaN.
        wide = x.astype(jnp.float32)
        cleared = jnp.where(is_member, wide, 0.0)
        buffer[...] = cleared.astype(x.dtype)
    plgpu.commit_smem()

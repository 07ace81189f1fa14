"""What a warpgroup computes on one tile of scores: loads, matmuls, the terms, the mask.

On a GPU values are spread over the registers of a warpgroup as its matmul wants them, and every
load says so. JAX's interpreter of GPU kernels knows neither layouts, nor matmuls with an operand in
registers, nor slices that start where
a number says: there the same functions use plain values. All else (copies, barriers, warpgroups,
    loops) is the same.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

# Not public before JAX 0.11.
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jaxtyping import Array, Float

from research.kernels.attention.gpu_plan import WARPGROUPS, Plan

LOG2E = math.log2(math.e)
# exp2 gives 0 for it whatever is subtracted, and differences with it stay finite.
HIDDEN = -1e30
WGMMA = plgpu.Layout.WGMMA


@runtime_checkable
class Interpreted(Protocol):
    """A plan, of this kernel or another, that says where it runs."""

    interpret: bool


@dataclasses.dataclass(frozen=True)
class Tile:
    """Where a tile of scores lies.

    Attributes:
      batch, head: indices, traced.
      query, key: the first of each, traced.
      shape: rows and columns.
      transposed: whether the rows are keys.
    """

    batch: Array
    head: Array
    query: Array
    key: Array
    shape: tuple[int, int]
    transposed: bool = False

    @property
    def query_axis(self) -> int:
        """The axis along which the queries lie."""
        return int(self.transposed)


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns shared memory laid out for the copy engine and the matmul."""
    size = jnp.dtype(dtype).itemsize
    swizzle = math.gcd(128, shape[-1] * size)
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def launch(
    plan: Interpreted, body: functools.partial, out_type: Any, scratch: dict[str, Any], **grid: int
) -> Callable:
    """Returns `body` as a kernel of two warpgroups that compute and one that copies.

    Args:
      plan: the static plan.
      body: takes the refs of inputs and outputs, then the scratch by name.
      out_type: what it writes.
      scratch: what a block shares.
      **grid: the size of each axis of the grid by name, the fastest first.
    """
    body.__name__ = body.func.__name__.strip("_")  # what profilers show
    names = tuple(reversed(grid))  # Of a kernel's grid the last axis is the fastest.
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid[name] for name in names),
        grid_names=names,
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=InterpretGPUParams() if plan.interpret else None,
    )


def spread(plan: Interpreted, x: Array, axis: int | None = None) -> Array:
    """Returns a value made in the kernel in the matmul's layout; a vector lies along `axis` of a
    tile.
    """
    if plan.interpret:
        return x
    return plgpu.layout_cast(x, WGMMA if axis is None else WGMMA.reduce(1 - axis))


def load(plan: Interpreted, ref: Any, index: tuple, axis: int | None = None) -> Array:
    """Loads a tile, or a vector that lies along `axis` of a tile, from device memory.

    Args:
      plan: the static plan.
      ref: the array.
      index: integers and `pl.ds`, one a dimension.
      axis: None for a tile.
    """
    if not plan.interpret:
        layout = WGMMA if axis is None else WGMMA.reduce(1 - axis)
        return plgpu.load(ref, index, layout=layout, optimized=False)
    x = ref[tuple(slice(None) if isinstance(i, pl.Slice) else i for i in index)]
    for dimension, part in enumerate(i for i in index if isinstance(i, pl.Slice)):
        x = lax.dynamic_slice_in_dim(x, part.start, part.size, dimension)
    return x


def along(vector: Array, axis: int, shape: tuple[int, int]) -> Array:
    """Returns a vector along `axis`, repeated over the other one."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def product(
    plan: Interpreted,
    a: Any,
    b: Any,
    start: Float[Array, "M P"] | None = None,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> Float[Array, "M P"]:
    """Returns start + a b in float32, with either of them transposed or not.

    Args:
      plan: the static plan.
      a: a ref in shared memory or a value.
      b: a ref in shared memory.
      start: None is zero.
      transpose_a: whether a, a ref then, is read transposed.
      transpose_b: whether b is read transposed.
      meanwhile: done after the matmul is given to the tensor cores and before its result is
          awaited.
    """
    if plan.interpret:
        numbers = (((0 if transpose_a else 1,), (1 if transpose_b else 0,)), ((), ()))
        out = lax.dot_general(a[...], b[...], numbers, preferred_element_type=jnp.float32)
        meanwhile()
        return out if start is None else start + out
    left = a.transpose((1, 0)) if transpose_a else a
    right = b.transpose((1, 0)) if transpose_b else b

    def multiply(accumulator: Any) -> Any:
        plgpu.wgmma(accumulator, left, right)
        meanwhile()
        return accumulator[...] if start is None else None

    if start is None:
        return pl.run_scoped(multiply, plgpu.ACC((left.shape[0], right.shape[1]), jnp.float32))
    return pl.run_state(multiply)(plgpu.ACC.init(start))


def zeros(plan: Interpreted, *shape: int, axis: int | None = None) -> Array:
    """Returns zeros in the matmul's layout; a vector lies along `axis` of a tile."""
    return spread(plan, jnp.zeros(shape, jnp.float32), axis)


def scores(
    plan: Plan, refs: dict[str, Any], raw: Float[Array, "M P"], tile: Tile, *, masked: bool
) -> tuple[Float[Array, "M P"], Float[Array, "M P"] | None]:
    """Returns the scores of a tile times log₂e, `HIDDEN` where the mask says so, and the slope of
    the cap.

    Args:
      plan: the static plan.
      refs: the arrays of `gpu_plan.extras`.
      raw: q kᵀ, or k qᵀ of a transposed tile.
      tile: where it lies.
      masked: whether the mask hides anything here.
    """
    slope = None
    if plan.softcap is None and "bias" not in refs and "alibi" not in refs:
        out = raw * (plan.scale * LOG2E)
    else:
        out = raw * plan.scale
        if plan.softcap is not None:
            bounded = jnp.tanh(out * (1.0 / plan.softcap))
            slope, out = 1.0 - bounded * bounded, bounded * plan.softcap
        if "alibi" in refs:
            distance = (
                _positions(plan, refs, tile, "q") - _positions(plan, refs, tile, "kv")
            ).astype(jnp.float32)
            out -= jnp.abs(distance) * refs["alibi"][tile.head]
        if "bias" in refs:
            out += _bias(plan, refs["bias"], tile)
        out *= LOG2E
    visible = _visible(plan, refs, tile) if masked else None
    return (out if visible is None else jnp.where(visible, out, HIDDEN)), slope


def _positions(plan: Plan, refs: dict[str, Any], tile: Tile, side: str) -> Array:
    name = f"{side}_positions"
    if name in refs:
        return _tokens(plan, refs[name], tile, side)
    return _indices(plan, tile, side)


def _indices(plan: Plan, tile: Tile, side: str) -> Array:
    axis = tile.query_axis if side == "q" else 1 - tile.query_axis
    return spread(plan, lax.broadcasted_iota(jnp.int32, tile.shape, axis)) + (
        tile.query if side == "q" else tile.key
    )


def _tokens(plan: Plan, ref: Any, tile: Tile, side: str) -> Array:
    """Returns numbers a token of one side, repeated over the other one."""
    start, axis = (tile.query, tile.query_axis) if side == "q" else (tile.key, 1 - tile.query_axis)
    vector = load(plan, ref, (tile.batch, pl.ds(start, tile.shape[axis])), axis)
    return along(vector, axis, tile.shape)


def _visible(plan: Plan, refs: dict[str, Any], tile: Tile) -> Array | None:
    seen = []
    if plan.causal or plan.window is not None:
        p_t, p_s = _positions(plan, refs, tile, "q"), _positions(plan, refs, tile, "kv")
        if plan.causal:
            seen.append(p_t >= p_s)
        if plan.window is not None:
            distance = p_t - p_s
            seen += [distance < plan.window, distance > -plan.window]
        if "prefix" in refs:
            seen = [_all(seen) | (p_s < refs["prefix"][tile.batch])]
    if "q_segments" in refs:
        ours, theirs = (_tokens(plan, refs[f"{side}_segments"], tile, side) for side in ("q", "kv"))
        seen += [ours == theirs, theirs != 0]
    elif plan.keys != plan.padded_keys:
        seen.append(_indices(plan, tile, "kv") < plan.keys)
    return _all(seen) if seen else None


def _all(conditions: list[Array]) -> Array:
    out = conditions[0]
    for condition in conditions[1:]:
        out = out & condition
    return out


def _bias(plan: Plan, ref: Any, tile: Tile) -> Array:
    """Returns the bias of a tile; a ref of a transposed tile is transposed too."""
    sizes = tuple(ref.shape)
    starts = (tile.key, tile.query) if tile.transposed else (tile.query, tile.key)
    index = [tile.batch if sizes[0] > 1 else 0, tile.head if sizes[1] > 1 else 0]
    index += [
        pl.ds(start, n) if size > 1 else 0
        for start, n, size in zip(starts, tile.shape, sizes[2:], strict=True)
    ]
    long = [axis for axis in (0, 1) if sizes[2 + axis] > 1]
    if not long:
        return ref[tuple(index)].astype(jnp.float32)
    if len(long) == 2:
        return load(plan, ref, tuple(index)).astype(jnp.float32)
    return along(load(plan, ref, tuple(index), long[0]).astype(jnp.float32), long[0], tile.shape)


def arrange_schedule(barrier: Any) -> None:
    """Meets the other warpgroup, so that one's softmax runs beside the other's matmuls."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def feed(
    total: Array, stages: int, free: tuple[Any, ...], copy: Callable[[Array, Array], None]
) -> None:
    """Fills a ring of buffers, each as soon as both warpgroups are done with it.

    Args:
      total: how many steps.
      stages: how many buffers.
      free: a barrier a buffer, of each of the rings that are filled together.
      copy: starts the copies of a step into a buffer.
    """

    @pl.loop(0, total)
    def _(step: Array) -> None:
        slot = lax.rem(step, jnp.int32(stages))

        @pl.when(step >= stages)
        def _() -> None:
            for barrier in free:
                plgpu.barrier_wait(barrier.at[slot])

        copy(step, slot)

    for slot in range(stages):

        @pl.when(slot < total)
        def _(slot: int = slot) -> None:
            for barrier in free:
                plgpu.barrier_wait(barrier.at[slot])


def store(value: Array, buffer: Any, target: Any) -> None:
    """Writes a tile or a vector to device memory through shared memory, which is free when it
    returns.
    """
    buffer[...] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, target)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

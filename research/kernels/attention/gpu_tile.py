"""What the warpgroups of a Hopper kernel do: launch, copies, layouts in registers, matmuls.

On a GPU the values of a tile are spread over the registers of a warpgroup in the layout that its
matmul (WGMMA) wants, and every load names that layout. JAX's interpreter of GPU kernels has
neither layouts, nor matmuls with an operand in registers, nor slices with a traced start: there the
same functions use plain values. All else (copies, barriers, warpgroups, loops) is the same.
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

from research.kernels.attention.gpu_plan import WARPGROUPS

LOG2E = math.log2(math.e)
# The score of a hidden key: finite, so that differences with it are finite. exp2(HIDDEN - m) is 0
# for every running maximum m >= HIDDEN / 2; without a sink m starts there.
HIDDEN = -1e30
WGMMA = plgpu.Layout.WGMMA
# Registers of a thread: 2 * 232 + 40 of the 512 that three warpgroups of a block can have.
COMPUTE_REGISTERS = 232
COPY_REGISTERS = 40


@runtime_checkable
class Interpreted(Protocol):
    """A plan, of this kernel or another, that says where it runs."""

    interpret: bool


def swizzled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns shared memory laid out for the copy engine and the matmul."""
    size = jnp.dtype(dtype).itemsize
    # A row of 64 elements of 16 bits has a swizzle of 128 bytes, the widest.
    swizzle = math.gcd(128, shape[-1] * size)
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def launch(
    plan: Interpreted,
    kernel: functools.partial,
    out_type: Any,
    scratch: dict[str, Any],
    **grid: int,
) -> Callable:
    """Returns `kernel`, run by blocks of two warpgroups that compute and one that copies.

    Args:
      plan: the static plan.
      kernel: takes the refs of inputs and outputs, then the scratch by name.
      out_type: what it writes.
      scratch: what a block shares.
      **grid: the size of each axis of the grid by name, the fastest first.
    """
    kernel.__name__ = kernel.func.__name__.strip("_")  # what profilers show
    names = tuple(reversed(grid))  # Of a kernel's grid the last axis is the fastest.
    interpret = InterpretGPUParams() if plan.interpret else None
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=scratch,
        grid=tuple(grid[name] for name in names),
        grid_names=names,
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )


def specialize(warpgroup: Array, compute: Callable[[], None], copy: Callable[[], None]) -> None:
    """Runs `compute` in the warpgroups that compute, and `copy` in the one that copies.

    Args:
      warpgroup: its index.
      compute: reads what is copied.
      copy: starts all copies that the others wait for.
    """

    @pl.when(warpgroup < WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
        compute()

    @pl.when(warpgroup == WARPGROUPS)
    def _() -> None:
        plgpu.set_max_registers(COPY_REGISTERS, action="decrease")
        copy()


def arrange_schedule(barrier: Any) -> None:
    """Meets the other warpgroup, so that one's softmax runs during the other's matmuls."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def spread(plan: Interpreted, x: Array, axis: int | None = None) -> Array:
    """Returns a value made in the kernel in the matmul's layout.

    Args:
      plan: the static plan.
      x: a tile, or a vector.
      axis: the axis of a tile that the vector runs along; None for a tile.
    """
    if plan.interpret:
        return x
    return plgpu.layout_cast(x, _layout(axis))


def _layout(axis: int | None) -> Any:
    """Returns the layout of a tile, or that of a vector along one of its axes."""
    if axis is None:
        return WGMMA
    # A vector along the rows is a tile whose columns are reduced, and the other way round.
    return WGMMA.reduce(1 - axis)


def zeros(plan: Interpreted, *shape: int, axis: int | None = None) -> Array:
    """Returns zeros in the matmul's layout; a vector runs along `axis` of a tile."""
    return spread(plan, jnp.zeros(shape, jnp.float32), axis)


def along(vector: Array, axis: int, shape: tuple[int, int]) -> Array:
    """Returns a vector along `axis`, broadcast over the other axis of a tile."""
    return lax.broadcast_in_dim(vector, shape, [axis])


def load(plan: Interpreted, ref: Any, index: tuple, axis: int | None = None) -> Array:
    """Loads a tile, or a vector that runs along `axis` of a tile, from device memory.

    Args:
      plan: the static plan.
      ref: the array.
      index: integers and `pl.ds`, one per dimension.
      axis: None for a tile.
    """
    if not plan.interpret:
        return plgpu.load(ref, index, layout=_layout(axis), optimized=False)

    # The interpreter has no traced slices: whole axes are loaded, then cut.
    # ref[3, ds(64, 32), 5] is ref[3, :, 5], and its axis 0 cut to 64 : 96.
    whole = tuple(slice(None) if isinstance(part, pl.Slice) else part for part in index)
    cuts = [part for part in index if isinstance(part, pl.Slice)]
    x = ref[whole]
    for dimension, cut in enumerate(cuts):
        x = lax.dynamic_slice_in_dim(x, cut.start, cut.size, dimension)
    return x


def store(value: Array, buffer: Any, target: Any) -> None:
    """Writes a tile or a vector to device memory through shared memory.

    The shared memory is free when it returns.
    """
    buffer[...] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(buffer, target)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def product(
    plan: Interpreted,
    a: Any,
    b: Any,
    start: Float[Array, "rows columns"] | None = None,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> Float[Array, "rows columns"]:
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
        # a b contracts the axes 1 and 0, a bᵀ the axes 1 and 1.
        contracted = (0 if transpose_a else 1, 1 if transpose_b else 0)
        out = _interpreted_product(a[...], b[...], contracted)
        meanwhile()
        return out if start is None else start + out

    # Transposing a ref changes how the tensor cores read it, and moves nothing.
    left = a.transpose((1, 0)) if transpose_a else a
    right = b.transpose((1, 0)) if transpose_b else b

    def multiply(accumulator: Any) -> Any:
        plgpu.wgmma(accumulator, left, right)
        meanwhile()
        return accumulator[...] if start is None else None

    # The accumulator is in registers: it starts from a value, or from zeros.
    if start is not None:
        return pl.run_state(multiply)(plgpu.ACC.init(start))
    shape = (left.shape[0], right.shape[1])
    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))


def _interpreted_product(a: Array, b: Array, contracted: tuple[int, int]) -> Array:
    """Returns a b in float32, contracting an axis of each."""
    axis_a, axis_b = contracted
    no_batch = ((), ())
    return lax.dot_general(
        a,
        b,
        dimension_numbers=(((axis_a,), (axis_b,)), no_batch),
        preferred_element_type=jnp.float32,
    )


@dataclasses.dataclass(frozen=True)
class Buffers:
    """Shared memory of one operand, with a barrier per slot that says when its copy has arrived.

    Attributes:
      smem: the slots, `[slots, tokens, H]`.
      full: one barrier per slot.
    """

    smem: Any
    full: Any

    def copy(self, source: Any, slot: Any) -> None:
        """Starts the copy of a part of device memory into a slot."""
        plgpu.copy_gmem_to_smem(source, self.smem.at[slot], self.full.at[slot])

    def wait(self, slot: Any) -> Any:
        """Waits for the copy into a slot; returns the slot."""
        plgpu.barrier_wait(self.full.at[slot])
        return self.smem.at[slot]


@dataclasses.dataclass(frozen=True)
class Ring(Buffers):
    """Buffers that are filled again and again, one step per slot, as soon as they are read.

    Attributes:
      free: one barrier per slot: both warpgroups arrive when they are done with it.
    """

    free: Any

    def release(self, slot: Any) -> None:
        """Says that this warpgroup is done with a slot."""
        plgpu.barrier_arrive(self.free.at[slot])


def own_buffers(scratch: dict[str, Any], name: str) -> Buffers:
    """Returns the buffers of an operand of which each warpgroup has its own rows."""
    return Buffers(scratch[f"{name}_smem"], scratch[f"{name}_full"])


def ring(scratch: dict[str, Any], name: str) -> Ring:
    """Returns the ring of an operand that is copied step by step."""
    return Ring(scratch[f"{name}_smem"], scratch[f"{name}_full"], scratch[f"{name}_free"])


def ring_slot(step: Array, stages: int) -> Array:
    """Returns the slot of a step in a ring of `stages` slots."""
    # Two stages: steps 0, 1, 2, 3 -> slots 0, 1, 0, 1.
    return lax.rem(step, jnp.int32(stages))


def feed(
    total: Array, stages: int, free: tuple[Any, ...], copy: Callable[[Array, Array], None]
) -> None:
    """Fills a ring of buffers, each as soon as both warpgroups are done with it.

    Args:
      total: how many steps.
      stages: how many buffers.
      free: one barrier per buffer, of each of the rings that are filled together.
      copy: starts the copies of a step into a buffer.
    """

    def wait_until_free(slot: Any) -> None:
        for barrier in free:
            plgpu.barrier_wait(barrier.at[slot])

    @pl.loop(0, total)
    def _(step: Array) -> None:
        slot = ring_slot(step, stages)

        # The first steps find empty buffers.
        @pl.when(step >= stages)
        def _() -> None:
            wait_until_free(slot)

        copy(step, slot)

    # Every arrival is waited for, so that the barriers are as they were at the start.
    for slot in range(stages):

        @pl.when(slot < total)
        def _(slot: int = slot) -> None:
            wait_until_free(slot)

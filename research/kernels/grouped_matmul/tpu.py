"""The grouped matmul for TPU: a Pallas kernel whose grid goes over the visits of tiles of rows."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from research.kernels.grouped_matmul.visits import visits
from research.parallel.target import platform


@dataclasses.dataclass(frozen=True)
class BlockSizes:
    """Sizes of the blocks that are in VMEM.

    Attributes:
      rows: of x.
      inner: of the axis that is contracted, or of D in the outer products.
      outer: of F.
    """

    rows: int = 512
    inner: int = 512
    outer: int = 1024

    def within(self, rows: int, inner: int, outer: int) -> "BlockSizes":
        """Returns the sizes, no larger than the arrays."""
        return BlockSizes(
            rows=min(self.rows, rows), inner=min(self.inner, inner), outer=min(self.outer, outer)
        )


def unsupported_reason(x: Float[Array, "rows D"], kernels: Float[Array, "E D F"]) -> str | None:
    """Returns the rule that a call breaks, with the nearest value that it allows."""
    if platform() != "tpu":
        return f"{platform()}: it needs a TPU"
    if x.dtype.name not in ("float32", "bfloat16"):
        return f"{x.dtype.name}: it takes bfloat16 or float32"
    return None


def _is_member(start: Any, stop: Any, tile: Any, rows: int) -> Bool[Array, "rows 1"]:
    """Returns which rows of a tile belong to the group that has the rows from start to stop."""
    # Tile 2 of 512 rows: rows 1024:1536, as a column
    first = tile * rows
    row = first + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    return (row >= start) & (row < stop)


def _zero_past_end(x: Array, axis: int, block: Any, size: int) -> Array:
    """Returns a block with zeros past the end of an axis, where VMEM holds anything.

    Args:
      x: the block.
      axis: of the array that may end within the block.
      block: its index on that axis.
      size: of the whole array on that axis.
    """
    block_size = x.shape[axis]
    if size % block_size == 0:
        return x
    # 700 columns in blocks of 512: columns 188 and up of block 1 are past the end.
    first = block * block_size
    index = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    zero = jnp.zeros((), x.dtype)
    return jnp.where(index < size, x, zero)


def grouped_matmul(
    x: Float[Array, "rows D"],
    kernels: Float[Array, "E D F"],
    group_sizes: Int[Array, "E"],
    blocks: BlockSizes = BlockSizes(),
    interpret: Any = False,
) -> Float[Array, "rows F"]:
    """Returns each row times the kernel of its group.

    Args:
      x, kernels, group_sizes: as in the API.
      blocks: sizes of the blocks.
      interpret: what `pallas_call` takes by that name; False compiles.
    """
    rows, width = x.shape
    features = kernels.shape[2]
    blocks = blocks.within(rows, width, features)
    plan = visits(group_sizes, rows, blocks.rows, every_group=False)
    number = plan.group.shape[0]

    # Index maps take a block of F, a visit and a block of D, then the plan.
    def x_index_map(f, v, d, group, tile, start, stop):
        return tile[v], d

    def kernel_index_map(f, v, d, group, tile, start, stop):
        return group[v], d, f

    def y_index_map(f, v, d, group, tile, start, stop):
        return tile[v], f

    call = pl.pallas_call(
        functools.partial(_matmul_kernel, width),
        out_shape=jax.ShapeDtypeStruct((rows, features), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(features, blocks.outer), number, pl.cdiv(width, blocks.inner)),
            in_specs=[
                pl.BlockSpec((blocks.rows, blocks.inner), x_index_map),
                pl.BlockSpec((1, blocks.inner, blocks.outer), kernel_index_map),
            ],
            out_specs=pl.BlockSpec((blocks.rows, blocks.outer), y_index_map),
            scratch_shapes=[pltpu.VMEM((blocks.rows, blocks.outer), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        name="tessera_grouped_matmul",
        interpret=interpret,
    )
    return call(plan.group, plan.tile, plan.start, plan.stop, x, kernels)


def _matmul_kernel(
    width: int,
    group_ref: Any,
    tile_ref: Any,
    start_ref: Any,
    stop_ref: Any,
    x_ref: Any,
    kernel_ref: Any,
    y_ref: Any,
    sum_ref: Any,
) -> None:
    """Adds the product of a block of D of one visit; the last block stores the group's rows.

    Args:
      width: D.
      group_ref, tile_ref, start_ref, stop_ref: the visits.
      x_ref, kernel_ref: blocks of the operands.
      y_ref: a block of the result, which stays in VMEM while its tile is visited.
      sum_ref: scratch of the shape of `y_ref`.
    """
    visit = pl.program_id(1)
    block = pl.program_id(2)
    blocks = pl.num_programs(2)

    @pl.when(block == 0)
    def _start() -> None:
        sum_ref[...] = jnp.zeros_like(sum_ref)

    # [rows, inner] and [inner, outer] -> [rows, outer]
    x = _zero_past_end(x_ref[...], 1, block, width)
    kernel = _zero_past_end(kernel_ref[0], 0, block, width)
    sum_ref[...] += jnp.dot(x, kernel, preferred_element_type=jnp.float32)

    @pl.when(block == blocks - 1)
    def _finish() -> None:
        rows = x_ref.shape[0]
        is_member = _is_member(start_ref[visit], stop_ref[visit], tile_ref[visit], rows)

        # Rows of other groups keep what earlier visits of the tile stored; before the first, 0.
        is_first_visit = visit == 0
        is_new_tile = tile_ref[visit] != tile_ref[jnp.maximum(visit - 1, 0)]
        is_first = is_first_visit | is_new_tile
        zeros = jnp.zeros_like(sum_ref)
        stored = y_ref[...].astype(jnp.float32)
        before = jnp.where(is_first, zeros, stored)
        y = jnp.where(is_member, sum_ref[...], before)
        y_ref[...] = y.astype(y_ref.dtype)


def transposed_matmul(
    g: Float[Array, "rows F"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "rows D"]:
    """Returns each row times the transposed kernel of its group."""
    transposed = kernels.swapaxes(1, 2)
    return grouped_matmul(g, transposed, group_sizes)


def outer_products(
    x: Float[Array, "rows D"],
    g: Float[Array, "rows F"],
    group_sizes: Int[Array, "E"],
    blocks: BlockSizes = BlockSizes(),
    interpret: Any = False,
) -> Float[Array, "E D F"]:
    """Returns x_eᵀ g_e of each group, in float32; arguments as of `grouped_matmul`."""
    rows, width = x.shape
    features = g.shape[1]
    groups = group_sizes.shape[0]
    blocks = blocks.within(rows, width, features)
    plan = visits(group_sizes, rows, blocks.rows, every_group=True)
    number = plan.group.shape[0]

    # Index maps take a block of D, a block of F and a visit, then the plan.
    def x_index_map(d, f, v, group, tile, start, stop):
        return tile[v], d

    def g_index_map(d, f, v, group, tile, start, stop):
        return tile[v], f

    def out_index_map(d, f, v, group, tile, start, stop):
        return group[v], d, f

    call = pl.pallas_call(
        _outer_kernel,
        out_shape=jax.ShapeDtypeStruct((groups, width, features), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(width, blocks.inner), pl.cdiv(features, blocks.outer), number),
            in_specs=[
                pl.BlockSpec((blocks.rows, blocks.inner), x_index_map),
                pl.BlockSpec((blocks.rows, blocks.outer), g_index_map),
            ],
            out_specs=pl.BlockSpec((1, blocks.inner, blocks.outer), out_index_map),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        name="tessera_grouped_outer_products",
        interpret=interpret,
    )
    return call(plan.group, plan.tile, plan.start, plan.stop, x, g)


def _outer_kernel(
    group_ref: Any,
    tile_ref: Any,
    start_ref: Any,
    stop_ref: Any,
    x_ref: Any,
    g_ref: Any,
    out_ref: Any,
) -> None:
    """Adds the outer product of one visit to its group's; arguments as of `_matmul_kernel`."""
    visit = pl.program_id(2)
    rows = x_ref.shape[0]
    is_member = _is_member(start_ref[visit], stop_ref[visit], tile_ref[visit], rows)

    # [rows, inner] and [rows, outer] -> [inner, outer]
    x = jnp.where(is_member, x_ref[...], jnp.zeros((), x_ref.dtype))
    g = jnp.where(is_member, g_ref[...], jnp.zeros((), g_ref.dtype))
    contract_rows = (((0,), (0,)), ((), ()))
    product = jax.lax.dot_general(x, g, contract_rows, preferred_element_type=jnp.float32)

    # The visits of a group follow each other: the first one starts the sum.
    is_first_visit = visit == 0
    is_new_group = group_ref[visit] != group_ref[jnp.maximum(visit - 1, 0)]
    is_first = is_first_visit | is_new_group

    @pl.when(is_first)
    def _start() -> None:
        out_ref[0] = product

    @pl.when(jnp.logical_not(is_first))
    def _add() -> None:
        out_ref[0] += product

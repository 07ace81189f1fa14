"""Grouped matmul for CPU: each group in blocks of rows of a few sizes, one product per block."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.kernels.row_major import swap_last

# Rows of a block, the largest first: large products are faster, and a group computes fewer rows too
# many than the smallest block has.
BLOCK_SIZES = (512, 256, 128, 64)


def unsupported_reason(x: Float[Array, "rows D"], kernels: Float[Array, "E D F"]) -> None:
    """Returns None: every call is supported."""


@dataclasses.dataclass(frozen=True)
class RowBlock:
    """Consecutive rows that are multiplied with the kernel of one group.

    Attributes:
      group: of the rows.
      start: index of the first row.
      size: rows.
      is_member: which rows belong to the group; None is all.
    """

    group: Int[Array, ""]
    start: Int[Array, ""]
    size: int
    is_member: Bool[Array, "size 1"] | None = None

    def take(self, x: Float[Array, "rows D"]) -> Float[Array, "size D"]:
        """Returns the rows, those of other groups zero."""
        block = jax.lax.dynamic_slice_in_dim(x, self.start, self.size)
        if self.is_member is None:
            return block
        zero = jnp.zeros((), x.dtype)
        return jnp.where(self.is_member, block, zero)

    def put(
        self, y: Float[Array, "rows F"], block: Float[Array, "size F"]
    ) -> Float[Array, "rows F"]:
        """Returns `y` with these rows, those of other groups as they were."""
        if self.is_member is not None:
            before = jax.lax.dynamic_slice_in_dim(y, self.start, self.size)
            block = jnp.where(self.is_member, block, before)
        return jax.lax.dynamic_update_slice_in_dim(y, block, self.start, axis=0)


def _for_each_block(
    group_sizes: Int[Array, "E"], rows: int, visit: Callable[[RowBlock, Any], Any], carry: Any
) -> Any:
    """Returns the carry after a visit of each block of each group.

    Args:
      group_sizes: rows of each group.
      rows: of all groups, and past the last one.
      visit: takes a block and the carry, and returns the carry.
      carry: the first one.
    """
    # Sizes [3, 0, 6] -> starts [0, 3, 3], stops [3, 3, 9]
    sizes = group_sizes.astype(jnp.int32)
    stops = jnp.cumsum(sizes)
    starts = stops - sizes
    block_sizes = [size for size in BLOCK_SIZES if size <= rows]
    if not block_sizes:
        block_sizes = [rows]

    def visit_full_block(group: Array, size: int, start: Array, index: Array, carry: Any) -> Any:
        block = RowBlock(group, start + index * size, size)
        return visit(block, carry)

    def visit_group(group: Array, carry: Any) -> Any:
        start = starts[group]
        stop = stops[group]

        # 1,400 rows are 2 blocks of 512, 1 of 256, none of 128 and 1 of 64; 56 rows are left.
        for size in block_sizes:
            number = (stop - start) // size
            visit_index = functools.partial(visit_full_block, group, size, start)
            carry = jax.lax.fori_loop(0, number, visit_index, carry)
            start = start + number * size

        # What is left is in one more block, which must not go past the last row.
        first = jnp.minimum(start, rows - size)
        index = first + jnp.arange(size)
        is_member = (index >= start) & (index < stop)
        last = RowBlock(group, first, size, is_member[:, None])
        return jax.lax.cond(
            start < stop, functools.partial(visit, last), lambda carry: carry, carry
        )

    return jax.lax.fori_loop(0, sizes.shape[0], visit_group, carry)


def grouped_matmul(
    x: Float[Array, "rows D"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "rows F"]:
    """Returns each row times the kernel of its group."""
    return _multiply(x, kernels, group_sizes, contracted=0)


def transposed_matmul(
    g: Float[Array, "rows F"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "rows D"]:
    """Returns each row times the transposed kernel of its group."""
    return _multiply(g, kernels, group_sizes, contracted=1)


def _multiply(x: Array, kernels: Array, group_sizes: Array, contracted: int) -> Array:
    """Returns each row times the kernel of its group, of which the axis `contracted` is summed."""
    rows = x.shape[0]
    features = kernels.shape[2 - contracted]
    # [size, D] and [D, F], or [size, F] and [D, F]
    dimension_numbers = (((1,), (contracted,)), ((), ()))

    def multiply(block: RowBlock, y: Array) -> Array:
        kernel = jax.lax.dynamic_index_in_dim(kernels, block.group, keepdims=False)
        product = jax.lax.dot_general(
            block.take(x), kernel, dimension_numbers, preferred_element_type=jnp.float32
        )
        return block.put(y, product)

    # All are rounded at once: in the loop it takes longer.
    y = jnp.zeros((rows, features), jnp.float32)
    y = _for_each_block(group_sizes, rows, multiply, y)
    return y.astype(x.dtype)


def outer_products(
    x: Float[Array, "rows D"], g: Float[Array, "rows F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """Returns x_eᵀ g_e of each group, in float32."""
    rows, width = x.shape
    features = g.shape[1]
    groups = group_sizes.shape[0]

    def add(block: RowBlock, sums: Array) -> Array:
        # [D, size] and [size, F] -> [D, F]
        columns = swap_last(block.take(x))
        product = jnp.dot(columns, block.take(g), preferred_element_type=jnp.float32)
        before = jax.lax.dynamic_index_in_dim(sums, block.group, keepdims=False)
        after = before + product
        return jax.lax.dynamic_update_index_in_dim(sums, after, block.group, axis=0)

    zeros = jnp.zeros((groups, width, features), jnp.float32)
    return _for_each_block(group_sizes, rows, add, zeros)

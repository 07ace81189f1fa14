"""The grouped matmul for CPU: each group in pieces of a few sizes, one product a piece."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.kernels.row_major import swap_last

# Rows of a piece, most first: the more, the faster a product, and a group wastes less than one of
# the smallest.
PIECES = (512, 256, 128, 64)


def unsupported_reason(x: Float[Array, "M D"], kernels: Float[Array, "E D F"]) -> None:
    """Takes everything."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Rows that meet one kernel.

    Attributes:
      group: theirs.
      first: of the rows.
      size: how many.
      mine: which of them are the group's; None is all.
    """

    group: Int[Array, ""]
    first: Int[Array, ""]
    size: int
    mine: Bool[Array, "size 1"] | None = None

    def take(self, x: Float[Array, "M D"]) -> Float[Array, "size D"]:
        """Returns the rows, those of other groups zero."""
        part = jax.lax.dynamic_slice_in_dim(x, self.first, self.size)
        return part if self.mine is None else jnp.where(self.mine, part, jnp.zeros((), x.dtype))

    def put(self, y: Float[Array, "M F"], part: Float[Array, "size F"]) -> Float[Array, "M F"]:
        """Returns `y` with these rows, those of other groups as they were."""
        if self.mine is not None:
            part = jnp.where(
                self.mine, part, jax.lax.dynamic_slice_in_dim(y, self.first, self.size)
            )
        return jax.lax.dynamic_update_slice_in_dim(y, part, self.first, axis=0)


def _over_pieces(
    group_sizes: Int[Array, "E"], rows: int, visit: Callable[[Piece, Any], Any], carry: Any
) -> Any:
    """Returns the carry after a visit of each piece of each group."""
    sizes = group_sizes.astype(jnp.int32)
    stops = jnp.cumsum(sizes)
    starts = stops - sizes
    pieces = [size for size in PIECES if size <= rows] or [rows]

    def group_of(group: Array, carry: Any) -> Any:
        start, stop = starts[group], stops[group]

        def whole(size: int, start: Array, index: Array, carry: Any) -> Any:
            return visit(Piece(group, start + index * size, size), carry)

        for size in pieces:
            number = (stop - start) // size
            carry = jax.lax.fori_loop(0, number, functools.partial(whole, size, start), carry)
            start = start + number * size
        # What is left lies in one more piece, which must not go past the last row.
        first = jnp.minimum(start, rows - size)
        places = first + jnp.arange(size)
        last = Piece(group, first, size, ((places >= start) & (places < stop))[:, None])
        return jax.lax.cond(
            start < stop, functools.partial(visit, last), lambda carry: carry, carry
        )

    return jax.lax.fori_loop(0, sizes.shape[0], group_of, carry)


def grouped_matmul(
    x: Float[Array, "M D"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M F"]:
    """Returns each row times the kernel of its group."""
    return _multiply(x, kernels, group_sizes, contracted=0)


def transposed_matmul(
    g: Float[Array, "M F"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M D"]:
    """Returns each row times the transposed kernel of its group."""
    return _multiply(g, kernels, group_sizes, contracted=1)


def _multiply(x: Array, kernels: Array, group_sizes: Array, contracted: int) -> Array:
    def multiply(piece: Piece, y: Array) -> Array:
        kernel = jax.lax.dynamic_index_in_dim(kernels, piece.group, keepdims=False)
        axes = (((1,), (contracted,)), ((), ()))
        return piece.put(
            y, jax.lax.dot_general(piece.take(x), kernel, axes, preferred_element_type=jnp.float32)
        )

    # All are rounded at once: in the loop it takes longer.
    y = jnp.zeros((x.shape[0], kernels.shape[2 - contracted]), jnp.float32)
    return _over_pieces(group_sizes, x.shape[0], multiply, y).astype(x.dtype)


def outer_products(
    x: Float[Array, "M D"], g: Float[Array, "M F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """Returns x_eᵀ g_e of each group, in float32."""

    def add(piece: Piece, total: Array) -> Array:
        product = jnp.dot(
            swap_last(piece.take(x)), piece.take(g), preferred_element_type=jnp.float32
        )
        share = jax.lax.dynamic_index_in_dim(total, piece.group, keepdims=False) + product
        return jax.lax.dynamic_update_index_in_dim(total, share, piece.group, axis=0)

    zeros = jnp.zeros((group_sizes.shape[0], x.shape[1], g.shape[1]), jnp.float32)
    return _over_pieces(group_sizes, x.shape[0], add, zeros)

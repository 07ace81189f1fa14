"""The matmul of an activation with a weight for CPU: one matrix product, accumulated in float32
from either type.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.row_major import row_major, swap_last
from research.parallel.gradient_sums import round_sum


def _dot(
    a: Float[Array, "rows columns"],
    b: Float[Array, "..."],
    b_axis: int = 0,
    dtype: str = "float32",
) -> Float[Array, "rows out"]:
    """Returns a b, or a bᵀ with `b_axis` = 1, by default in float32: a bfloat16 result would widen
    the operands first.
    """
    dimensions = (((1,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=dtype)


def multiply_table(
    x: Float[Array, "tokens D"], table: Float[Array, "V D"]
) -> Float[Array, "tokens V"]:
    """Returns x Eᵀ in float32, made as (E xᵀ)ᵀ: so the table streams through the matmul in the
    order in which it lies in memory.
    """
    # [V, D] [tokens, D] -> [V, tokens]
    product = _dot(table, x, b_axis=1)
    return product.T


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def affine(
    x: Float[Array, "tokens D"],
    kernel: Float[Array, "D F"],
    bias: Float[Array, "F"] | None,
    gradient_dtype: str = "float32",
) -> Float[Array, "tokens F"]:
    """Returns x W + b in the type of `x`; the gradient of W is made in `gradient_dtype`, that of b
    in float32.
    """
    kernel = kernel.astype(x.dtype)
    y = _dot(x, kernel)
    if bias is not None:
        bias = bias.astype(y.dtype)
        y = y + bias[None]
    return y.astype(x.dtype)


def _affine_fwd(
    x: Array, kernel: Array, bias: Array | None, gradient_dtype: str
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    y = affine(x, kernel, bias)
    return y, (x, kernel, bias)


def _affine_bwd(
    gradient_dtype: str, saved: tuple[Array, Array, Array | None], g: Float[Array, "tokens F"]
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = saved
    # The barrier keeps the sum over tokens from computing again what made g.
    g = jax.lax.optimization_barrier(g)
    # [tokens, F] [D, F]ᵀ -> [tokens, D]
    rounded_kernel = kernel.astype(x.dtype)
    dx = _dot(g, rounded_kernel, b_axis=1)
    dx = dx.astype(x.dtype)

    # [D, tokens] [tokens, F] -> [D, F]
    x_transposed = swap_last(x)
    dkernel = _dot(x_transposed, g, dtype=gradient_dtype)
    dkernel = row_major(dkernel)
    dkernel = round_sum(dkernel, kernel.dtype)
    if bias is None:
        return dx, dkernel, None
    dbias = g.sum(axis=0, dtype=jnp.float32)
    dbias = round_sum(dbias, bias.dtype)
    return dx, dkernel, dbias


affine.defvjp(_affine_fwd, _affine_bwd)

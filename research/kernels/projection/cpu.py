"""The matmul of an activation with a weight for CPU: one matrix product, accumulated in float32
from either type.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.row_major import row_major, swap_last


def _dot(
    a: Float[Array, "rows columns"], b: Float[Array, "..."], b_axis: int = 0
) -> Float[Array, "rows out"]:
    """Returns a b, or a bᵀ with `b_axis` = 1, in float32: a bfloat16 result would widen the
    operands first.
    """
    dimensions = (((1,), (b_axis,)), ((), ()))
    return jax.lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32)


@jax.custom_vjp
def affine(
    x: Float[Array, "tokens D"], kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None
) -> Float[Array, "tokens F"]:
    """Returns x W + b in the type of `x`; the gradients of W and b are never rounded to that
    type.
    """
    kernel = kernel.astype(x.dtype)
    y = _dot(x, kernel)
    if bias is not None:
        bias = bias.astype(y.dtype)
        y = y + bias[None]
    return y.astype(x.dtype)


def _affine_fwd(
    x: Array, kernel: Array, bias: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    y = affine(x, kernel, bias)
    return y, (x, kernel, bias)


def _affine_bwd(
    saved: tuple[Array, Array, Array | None], g: Float[Array, "tokens F"]
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
    dkernel = _dot(x_transposed, g)
    dkernel = row_major(dkernel)
    dkernel = dkernel.astype(kernel.dtype)
    if bias is None:
        return dx, dkernel, None
    dbias = g.sum(axis=0, dtype=jnp.float32)
    dbias = dbias.astype(bias.dtype)
    return dx, dkernel, dbias


affine.defvjp(_affine_fwd, _affine_bwd)

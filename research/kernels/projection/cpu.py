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
    y = _dot(x, kernel.astype(x.dtype))
    if bias is not None:
        y = y + bias.astype(y.dtype)[None]
    return y.astype(x.dtype)


def _affine_fwd(
    x: Array, kernel: Array, bias: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return affine(x, kernel, bias), (x, kernel, bias)


def _affine_bwd(
    saved: tuple[Array, Array, Array | None], g: Float[Array, "tokens F"]
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = saved
    # The barrier keeps the sum over tokens from computing again what made g.
    g = jax.lax.optimization_barrier(g)
    dx = _dot(g, kernel.astype(x.dtype), b_axis=1).astype(x.dtype)
    dkernel = row_major(_dot(swap_last(x), g)).astype(kernel.dtype)
    if bias is None:
        return dx, dkernel, None
    dbias = g.sum(axis=0, dtype=jnp.float32)
    return dx, dkernel, dbias.astype(bias.dtype)


affine.defvjp(_affine_fwd, _affine_bwd)

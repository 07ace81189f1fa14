"""The matmul of an activation with a weight for CPU: one matrix product, accumulated in float32
from either type.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.row_major import row_major, swap_last


def _dot(a: Float[Array, "R C"], b: Float[Array, "..."], b_axis: int = 0) -> Float[Array, "R P"]:
    """Returns a b, or a bᵀ with `b_axis` = 1, in float32: a bfloat16 result would widen the
    operands first.
    """
    return jax.lax.dot_general(
        a, b, (((1,), (b_axis,)), ((), ())), preferred_element_type=jnp.float32
    )


@jax.custom_vjp
def affine(
    x: Float[Array, "M D"], kernel: Float[Array, "D F"], bias: Float[Array, "F"] | None
) -> Float[Array, "M F"]:
    """Returns x W + b in the type of `x`; the gradients of W and b are never rounded to that
    type.
    """
    y = _dot(x, kernel.astype(x.dtype))
    return (y if bias is None else y + bias.astype(y.dtype)[None]).astype(x.dtype)


def _affine_fwd(
    x: Array, kernel: Array, bias: Array | None
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    return affine(x, kernel, bias), (x, kernel, bias)


def _affine_bwd(
    saved: tuple[Array, Array, Array | None], g: Float[Array, "M F"]
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = saved
    # The barrier keeps the sum over tokens from computing again what made g.
    g = jax.lax.optimization_barrier(g)
    dx = _dot(g, kernel.astype(x.dtype), b_axis=1).astype(x.dtype)
    dkernel = row_major(_dot(swap_last(x), g)).astype(kernel.dtype)
    dbias = None if bias is None else g.sum(axis=0, dtype=jnp.float32).astype(bias.dtype)
    return dx, dkernel, dbias


affine.defvjp(_affine_fwd, _affine_bwd)

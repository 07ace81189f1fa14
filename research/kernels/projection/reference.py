"""The matmul of an activation with a weight, contracted in place; the gradient of the weight is
summed in float32.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def _affine(x: Array, kernel: Array, bias: Array | None, axes: int) -> Array:
    kernel = kernel.astype(x.dtype)
    y = jnp.tensordot(x, kernel, axes)
    if bias is None:
        return y
    # [F] -> [1, 1, F]
    bias = bias.astype(x.dtype)
    return y + jax.lax.broadcast_to_rank(bias, y.ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def affine(
    x: Float[Array, "..."], kernel: Float[Array, "..."], bias: Float[Array, "..."] | None, axes: int
) -> Float[Array, "..."]:
    """Returns x W + b in the type of `x`; the gradients of W and b are never rounded to that
    type.
    """
    return _affine(x, kernel, bias, axes)


def _affine_fwd(
    x: Array, kernel: Array, bias: Array | None, axes: int
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    # Not `affine` itself: remat policies that save matmuls do not look into a custom gradient.
    y = _affine(x, kernel, bias, axes)
    return y, (x, kernel, bias)


def _affine_bwd(
    axes: int, saved: tuple[Array, Array, Array | None], g: Float[Array, "..."]
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = saved
    # x [B, T, N, H], W [N, H, D], g [B, T, D]: batch axes 0 and 1, and D is axis 2 of W and of g.
    num_batch = x.ndim - axes
    batch = tuple(range(num_batch))
    features = tuple(range(axes, kernel.ndim))
    g_features = tuple(range(num_batch, g.ndim))
    rounded_kernel = kernel.astype(x.dtype)
    dx = jnp.tensordot(g, rounded_kernel, (g_features, features))
    dkernel = jnp.tensordot(x, g, (batch, batch), preferred_element_type=jnp.float32)
    dkernel = dkernel.astype(kernel.dtype)
    if bias is None:
        return dx, dkernel, None
    dbias = g.sum(axis=batch, dtype=jnp.float32)
    dbias = dbias.astype(bias.dtype)
    return dx, dkernel, dbias


affine.defvjp(_affine_fwd, _affine_bwd)

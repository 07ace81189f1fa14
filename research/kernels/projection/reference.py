"""The matmul of an activation with a weight, contracted in place; the gradient of the weight is
summed in float32 where nothing else is said.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.parallel.gradient_sums import round_sum


def _affine(x: Array, kernel: Array, bias: Array | None, axes: int) -> Array:
    kernel = kernel.astype(x.dtype)
    y = jnp.tensordot(x, kernel, axes)
    if bias is None:
        return y
    # [F] -> [1, 1, F]
    bias = bias.astype(x.dtype)
    return y + jax.lax.broadcast_to_rank(bias, y.ndim)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def affine(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    bias: Float[Array, "..."] | None,
    axes: int,
    gradient_dtype: str = "float32",
) -> Float[Array, "..."]:
    """Returns x W + b in the type of `x`; the gradient of W is made in `gradient_dtype`, that of b
    in float32.
    """
    return _affine(x, kernel, bias, axes)


def _affine_fwd(
    x: Array, kernel: Array, bias: Array | None, axes: int, gradient_dtype: str
) -> tuple[Array, tuple[Array, Array, Array | None]]:
    # Not `affine` itself: remat policies that save matmuls do not look into a custom gradient.
    y = _affine(x, kernel, bias, axes)
    return y, (x, kernel, bias)


def _affine_bwd(
    axes: int, gradient_dtype: str, saved: tuple[Array, Array, Array | None], g: Float[Array, "..."]
) -> tuple[Array, Array, Array | None]:
    x, kernel, bias = saved
    # x [B, T, N, H], W [N, H, D], g [B, T, D]: batch axes 0 and 1, and D is axis 2 of W and of g.
    num_batch = x.ndim - axes
    batch = tuple(range(num_batch))
    features = tuple(range(axes, kernel.ndim))
    g_features = tuple(range(num_batch, g.ndim))
    rounded_kernel = kernel.astype(x.dtype)
    dx = jnp.tensordot(g, rounded_kernel, (g_features, features))
    dkernel = jnp.tensordot(x, g, (batch, batch), preferred_element_type=gradient_dtype)
    dkernel = round_sum(dkernel, kernel.dtype)
    if bias is None:
        return dx, dkernel, None
    dbias = g.sum(axis=batch, dtype=jnp.float32)
    dbias = round_sum(dbias, bias.dtype)
    return dx, dkernel, dbias


affine.defvjp(_affine_fwd, _affine_bwd)

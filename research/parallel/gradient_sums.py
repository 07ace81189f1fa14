"""Gradients of weights that all tokens share, in the type in which devices add them up."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def round_sum(total: Float[Array, "..."], dtype: Any) -> Float[Array, "..."]:
    """Returns a sum over tokens in a type, rounded after devices have added it up.

    Args:
      total: that the partitioner sums over devices, in its own type.
      dtype: of the result.
    """
    if total.dtype == dtype:
        return total
    # A mere conversion becomes part of the sum over devices on TPU: its result is bfloat16 then.
    bits = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(total, bits.nexp, bits.nmant)
    return rounded.astype(dtype)


@jax.custom_vjp
def in_float32(parameter: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns a parameter in float32, in which its gradient is summed."""
    return parameter.astype(jnp.float32)


def _in_float32_fwd(parameter: Array) -> tuple[Array, Array]:
    # An array without elements carries the type.
    return in_float32(parameter), jnp.zeros((0,), parameter.dtype)


def _in_float32_bwd(like: Array, g: Float[Array, "..."]) -> tuple[Array]:
    return (round_sum(g, like.dtype),)


in_float32.defvjp(_in_float32_fwd, _in_float32_bwd)

"""Gradients of weights that all tokens share, in the type in which devices add them up."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from research.parallel.mesh_axes import BATCH_AXES, CONTEXT_AXIS
from research.parallel.shard_map import dividing_axes, shard_map, sum_over_devices


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def take_rows(
    table: Float[Array, "V D"], ids: Int[Array, "..."], gradient_dtype: str
) -> Float[Array, "... D"]:
    """Returns rows of a table.

    In the gradient the rows of a device's own tokens are summed in float32, and those of all
    devices in a type.

    Args:
      table: one row for each id.
      ids: in [0, V); those of a batch, [B, T], may be sharded.
      gradient_dtype: in which the sum over devices is taken.
    """
    return table[ids]


def _take_rows_fwd(
    table: Array, ids: Array, gradient_dtype: str
) -> tuple[Array, tuple[Array, Array]]:
    # An array without elements carries the table's shape and type.
    like = jnp.zeros((0, table.shape[0]), table.dtype)
    return table[ids], (ids, like)


def _take_rows_bwd(
    gradient_dtype: str, saved: tuple[Array, Array], g: Float[Array, "... D"]
) -> tuple[Array, None]:
    ids, like = saved
    rows = like.shape[1]

    # Rows of ids that occur often are sums of many: only those over devices are rounded.
    def add_own(ids: Array, g: Array) -> Array:
        zeros = jnp.zeros((rows, g.shape[-1]), jnp.float32)
        total = zeros.at[ids].add(g.astype(jnp.float32))
        if not axes:
            return total
        return sum_over_devices(total, axes, gradient_dtype)

    axes = ()
    if ids.ndim == 2:
        batch_axes = dividing_axes(BATCH_AXES, ids.shape[0])
        context_axes = dividing_axes((CONTEXT_AXIS,), ids.shape[1])
        axes = (*batch_axes, *context_axes)
    if not axes:
        return add_own(ids, g).astype(like.dtype), None
    tokens = PartitionSpec(batch_axes or None, context_axes or None)
    total = shard_map(add_own, (tokens, tokens), PartitionSpec(), axes=axes)(ids, g)
    return round_sum(total, like.dtype), None


take_rows.defvjp(_take_rows_fwd, _take_rows_bwd)

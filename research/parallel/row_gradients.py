"""Gradients of tables of the vocabulary, which every token adds to.

Left to itself the partitioner adds them up over all devices that have other tokens, all of the
table on each, though a device keeps only its part of the width. Here a reduce-scatter over the axes
of the width comes first, and the sum over the others is of that part: between slices, which `data`
joins, go as many times fewer bytes as the width has shards.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from research.parallel.gradient_sums import round_sum
from research.parallel.mesh_axes import CONTEXT_AXIS, TENSOR_AXIS, WIDTH_AXES
from research.parallel.rules import constrain, partition_spec
from research.parallel.shard_map import batch_axes, dividing_axes, is_batch_whole, shard_map
from research.parallel.target import platform


def sum_over_tokens(
    gradient: Float[Array, "..."], token_axes: tuple[str, ...], width_axis: int, dtype: str
) -> Float[Array, "..."]:
    """Returns a device's part of a gradient, summed over all tokens: the part of the width that it
    has of the parameter itself; inside a `shard_map`.

    Args:
      gradient: of the device's tokens.
      token_axes: the mesh axes that shard tokens.
      width_axis: which axis of the gradient is the width.
      dtype: in which devices exchange and add; also the type of the sum, where there are several.
    """
    if not token_axes:
        return gradient
    # XLA for CPU adds in float32 in any case, and cannot compile sums in bfloat16 over some axes.
    added_in = "float32" if platform() == "cpu" else dtype
    gradient = gradient.astype(dtype).astype(added_in)
    # D = 64 over fsdp 4 and data 2: [64, V] -> [16, V], of which the sum over data is taken.
    width_axes = width_axes_of(token_axes, gradient.shape[width_axis])
    if width_axes:
        gradient = jax.lax.psum_scatter(
            gradient, width_axes, scatter_dimension=width_axis, tiled=True
        )
    other_axes = tuple(axis for axis in token_axes if axis not in width_axes)
    if other_axes:
        gradient = jax.lax.psum(gradient, other_axes)
    return gradient.astype(dtype)


def width_axes_of(token_axes: tuple[str, ...], width: int) -> tuple[str, ...]:
    """Returns the mesh axes of tokens over which the width of a parameter is sharded too."""
    both = tuple(axis for axis in WIDTH_AXES if axis in token_axes)
    return dividing_axes(both, width)


def local_width(token_axes: tuple[str, ...], width: int) -> int:
    """Returns the width of a device's part of a gradient, as `sum_over_tokens` gives it."""
    mesh = jax.sharding.get_abstract_mesh()
    return width // math.prod(mesh.shape[axis] for axis in width_axes_of(token_axes, width))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def take_rows(
    table: Float[Array, "V D"],
    ids: Int[Array, "B T"],
    names: tuple[str, str],
    gradient_dtype: str = "float32",
) -> Float[Array, "B T D"]:
    """Returns the rows of a table that ids name.

    Args:
      table: of rows.
      ids: in [0, V), sharded as a batch is.
      names: logical axes of the table.
      gradient_dtype: in which devices add up their gradients.
    """
    # Unshard the width first: a lookup in a table with sharded rows makes the partitioner copy the
    # table to every device. Where all devices have all ids, each looks up its own columns.
    width = "embed_in_generation" if is_batch_whole() else None
    return constrain(table, (names[0], width))[ids]


def _take_fwd(
    table: Array, ids: Array, names: tuple[str, str], gradient_dtype: str
) -> tuple[Array, tuple[Array, Int[Array, "B T"]]]:
    # Of the table only shape and type are needed.
    like = jnp.empty((0, *table.shape), table.dtype)
    return take_rows(table, ids, names, gradient_dtype), (like, ids)


def _take_bwd(
    names: tuple[str, str],
    gradient_dtype: str,
    saved: tuple[Array, Array],
    g: Float[Array, "B T D"],
) -> tuple[Array, None]:
    like, ids = saved
    _, num_rows, width = like.shape
    token_axes = (
        *batch_axes(ids.shape[0]),
        *dividing_axes((CONTEXT_AXIS,), ids.shape[1]),
    )
    row_axes = ()
    if partition_spec(names)[0] == TENSOR_AXIS:
        row_axes = dividing_axes((TENSOR_AXIS,), num_rows)
    shards = jax.sharding.get_abstract_mesh().shape[TENSOR_AXIS] if row_axes else 1
    local_rows = num_rows // shards

    def add_rows(ids: Array, g: Array) -> Array:
        index = ids
        if row_axes:
            # 8 rows on each of 2 devices: ids [3, 9] -> [3, 9] on the first, [-5, 1] on the second
            index = ids - jax.lax.axis_index(row_axes) * local_rows
        # Indices below 0 would count from the end.
        index = jnp.where(index < 0, local_rows, index)
        gradient = jnp.zeros((local_rows, width), jnp.float32)
        gradient = gradient.at[index].add(g.astype(jnp.float32), mode="drop")
        return sum_over_tokens(gradient, token_axes, 1, gradient_dtype)

    if not (token_axes or row_axes):
        return round_sum(add_rows(ids, g), like.dtype), None
    batch = tuple(axis for axis in token_axes if axis != CONTEXT_AXIS)
    length = CONTEXT_AXIS if CONTEXT_AXIS in token_axes else None
    tokens = PartitionSpec(batch or None, length)
    width_axes = width_axes_of(token_axes, width)
    gradient = PartitionSpec(row_axes or None, width_axes or None)
    total = shard_map(add_rows, (tokens, tokens), gradient)(ids, g)
    return round_sum(total, like.dtype), None


take_rows.defvjp(_take_fwd, _take_bwd)

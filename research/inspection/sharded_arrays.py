"""Arrays on a mesh: their logical axes, how these are sharded, and the bytes on one device.

No array is made, and no device is needed.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from research.core.trees import path_name
from research.inspection.parameter_summary import layers_name
from research.models.config import ModelConfig
from research.parallel.parameter import is_box
from research.parallel.rules import param_shardings, parameter_spec, without_width

# encoder/layers_3/mlp/up/kernel -> encoder/, layers, 3, mlp/up/kernel
_LAYER = re.compile(
    r"(?P<stack>(?:.*?/)?)(?P<kind>first_layers|layers|future)_(?P<index>\d+)/(?P<leaf>.*)"
)
_STACKED = re.compile(r"(?P<stack>(?:.*?/)?)layers/(?P<leaf>.*)")


@dataclasses.dataclass(frozen=True)
class ShardedArray:
    """An array on a mesh.

    Attributes:
      name: with slashes.
      axes: logical names, and `choices` for the rows of experts; None for an axis without one.
      shape: of the whole array.
      dtype: of its numbers.
      mesh_axes: for each axis, the mesh axes of more than one device that shard it.
      device_shape: of the part on one device.
    """

    name: str
    axes: tuple[str | None, ...]
    shape: tuple[int, ...]
    dtype: str
    mesh_axes: tuple[tuple[str, ...], ...]
    device_shape: tuple[int, ...]

    @property
    def device_bytes(self) -> int:
        """Bytes of the part on one device."""
        return math.prod(self.device_shape) * jnp.dtype(self.dtype).itemsize


@dataclasses.dataclass(frozen=True)
class ArrayGroup:
    """Arrays of layers that are alike, or a single array of no layer.

    Attributes:
      name: of the layers; empty for an array of no layer.
      count: how many layers have these arrays each; 1 where they are stacked.
      stacked: whether each array has a leading axis of layers.
      arrays: of one layer, or stacked.
    """

    name: str
    count: int
    stacked: bool
    arrays: tuple[ShardedArray, ...]

    @property
    def device_bytes_each(self) -> int:
        """Bytes of the arrays on one device, of one layer unless they are stacked."""
        return sum(array.device_bytes for array in self.arrays)

    @property
    def device_bytes(self) -> int:
        """Bytes of all layers of the group on one device."""
        return self.count * self.device_bytes_each


def sharded_array(
    name: str,
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    dtype: Any,
    mesh: AbstractMesh,
    *,
    shard_width: bool = True,
) -> ShardedArray:
    """Returns an array as the table of logical axes shards it.

    Args:
      name: of the array.
      axes: logical names.
      shape: of the whole array; the mesh divides it.
      dtype: of its numbers.
      mesh: sizes of the mesh axes.
      shard_width: as of `param_shardings`.
    """
    names = axes
    if not shard_width:
        names = without_width(axes)
    spec = parameter_spec(names, shape, mesh)
    mesh_axes = []
    for entry in spec:
        sharding = (entry,) if isinstance(entry, str) else entry or ()
        mesh_axes.append(tuple(axis for axis in sharding if mesh.shape[axis] > 1))
    device_shape = NamedSharding(mesh, spec).shard_shape(shape)
    return ShardedArray(
        name, axes, shape, jnp.dtype(dtype).name, tuple(mesh_axes), tuple(device_shape)
    )


def parameter_groups(
    config: ModelConfig, boxed: Any, mesh: AbstractMesh, *, shard_width: bool
) -> list[ArrayGroup]:
    """Returns the parameters of a model; layers that are alike are one group.

    Args:
      config: the model.
      boxed: abstract parameters with their logical axes.
      mesh: sizes of the mesh axes.
      shard_width: as of `param_shardings`.

    Raises:
      UserError: a mesh axis does not divide a parameter.
    """
    # It checks what divides.
    param_shardings(boxed, mesh)
    leaves = jax.tree_util.tree_leaves_with_path(boxed, is_leaf=is_box)
    arrays = []
    for path, box in leaves:
        value = box.value
        array = sharded_array(
            path_name(path), box.names, value.shape, value.dtype, mesh, shard_width=shard_width
        )
        arrays.append(array)
    return group_layers(config, arrays)


def group_layers(config: ModelConfig, arrays: Sequence[ShardedArray]) -> list[ArrayGroup]:
    """Returns arrays in groups: those of layers that are alike, stacked ones, and each other array
    by itself.

    Args:
      config: the model.
      arrays: named as parameters are, `encoder/layers_3/…` or `layers/…` where stacked.
    """
    layers: dict[tuple[str, str], dict[int, list[ShardedArray]]] = {}
    stacked: dict[str, list[ShardedArray]] = {}
    others = []
    for array in arrays:
        unrolled_name = _LAYER.fullmatch(array.name)
        stacked_name = _STACKED.fullmatch(array.name)
        if unrolled_name:
            stack = (unrolled_name["stack"], unrolled_name["kind"])
            layer = layers.setdefault(stack, {}).setdefault(int(unrolled_name["index"]), [])
            layer.append(dataclasses.replace(array, name=unrolled_name["leaf"]))
        elif stacked_name:
            stack_arrays = stacked.setdefault(stacked_name["stack"], [])
            stack_arrays.append(dataclasses.replace(array, name=stacked_name["leaf"]))
        else:
            others.append(ArrayGroup("", 1, False, (array,)))

    groups = []
    for (stack, kind), by_index in layers.items():
        groups += _alike(config, stack, kind, by_index)
    first = len(config.first_layers)
    for stack, stack_arrays in stacked.items():
        indices = list(range(first, first + stack_arrays[0].shape[0]))
        name = _stack_text(stack) + layers_name(indices)
        groups.append(ArrayGroup(name, 1, True, tuple(stack_arrays)))
    return [*others, *groups]


def _alike(
    config: ModelConfig, stack: str, kind: str, layers: dict[int, list[ShardedArray]]
) -> list[ArrayGroup]:
    """Returns one group for each set of layers with the same arrays."""
    # {0: [a, b], 1: [a, b], 2: [a]} -> {(a, b): [0, 1], (a,): [2]}
    alike: dict[tuple[ShardedArray, ...], list[int]] = {}
    for index in sorted(layers):
        alike.setdefault(tuple(layers[index]), []).append(index)

    groups = []
    for arrays, indices in alike.items():
        if kind == "layers":
            indices = [len(config.first_layers) + index for index in indices]
        text = layers_name(indices)
        if kind == "future":
            # layers 0–1 -> multi-token prediction 0–1
            _, _, numbers = text.partition(" ")
            text = f"multi-token prediction {numbers}"
        groups.append(ArrayGroup(_stack_text(stack) + text, len(indices), False, arrays))
    return groups


def _stack_text(stack: str) -> str:
    # encoder/ -> "encoder, "
    return stack.replace("/", ", ")

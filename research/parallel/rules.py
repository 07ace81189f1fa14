"""The one table from logical axis names to mesh axes, and what follows from it."""

from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from research.core.trees import path_name
from research.parallel.divisibility import check_divides
from research.parallel.mesh_axes import (
    BATCH_AXES,
    CONTEXT_AXIS,
    PIPELINE_AXIS,
    TENSOR_AXIS,
    WIDTH_AXES,
)
from research.parallel.parameter import is_box
from research.parallel.shard_map import batch_axes, dividing_axes
from research.parallel.stages import without_stages

# First come, first served: a mesh axis that an earlier row took for the same array is not used
# again. Activations, whose batch takes `fsdp` and `expert` and whose length takes `context`, do not
# shard their width, while parameters do. Along `expert` only the experts are sharded.
# Projections from a latent have no width: they shard the latent, over fewer axes, as it is narrow.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", BATCH_AXES),
    ("length", (CONTEXT_AXIS,)),
    # The tokens of hidden states between sublayers that `tensor` shards.
    ("residual", (CONTEXT_AXIS, TENSOR_AXIS)),
    ("layers", (PIPELINE_AXIS,)),
    ("expert", ("expert",)),
    ("vocab", (TENSOR_AXIS,)),
    ("heads", (TENSOR_AXIS,)),
    ("kv_heads", (TENSOR_AXIS,)),
    ("mlp", (TENSOR_AXIS,)),
    ("embed", WIDTH_AXES),
    ("latent", ("fsdp",)),
    # The width of parameters in generation: what is gathered is gathered for every new token.
    ("embed_in_generation", ("fsdp",)),
    ("positions", ()),
    ("head", ()),
    ("rank", ()),
    ("router", ()),
    ("selection", ()),
    ("single", ()),
    ("types", ()),
    ("buckets", ()),
    ("classes", ()),
)
# What is whole on each device where the width of the model is, as ZeRO levels below 3 have it.
WIDTH_NAMES = ("embed", "latent")


def partition_spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """Returns how an array with these logical axes is sharded on the mesh."""
    known = {name for name, _ in RULES}
    unknown = set(names) - known - {None}
    assert not unknown, f"logical axes {unknown} have no rule"

    # ("batch", "length", "embed") -> (("data", "fsdp", "expert"), "context", None)
    spec: list[Any] = [None] * len(names)
    taken: set[str] = set()
    for name, mesh_axes in RULES:
        for i, axis in enumerate(names):
            free = tuple(mesh_axis for mesh_axis in mesh_axes if mesh_axis not in taken)
            if axis != name or not free:
                continue
            # A tuple of one axis is written as that axis.
            spec[i] = free if len(free) > 1 else free[0]
            taken |= set(free)
    return PartitionSpec(*spec)


def parameter_spec(
    names: tuple[str | None, ...], shape: tuple[int, ...], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """Returns how a parameter, or what has its shape, is sharded: as `partition_spec` says, but
    that `pipeline` shards another axis of stacked layers whose number it does not divide.

    Args:
      names: logical axes.
      shape: of the array.
      mesh: the devices.
    """
    spec = partition_spec(names)
    if names[:1] != ("layers",) or shape[0] % mesh.shape[PIPELINE_AXIS] == 0:
        return spec
    # Stages of different sizes get their layers in each step.
    return without_stages(NamedSharding(mesh, spec), shape).spec


def without_width(names: tuple[str | None, ...]) -> tuple[str | None, ...]:
    """Returns logical axes of a parameter without those that only ZeRO level 3 shards."""
    return tuple(None if name in WIDTH_NAMES else name for name in names)


def constrain(x: Shaped[Array, "..."], names: tuple[str | None, ...]) -> Shaped[Array, "..."]:
    """Lays an activation out by its logical axes; without a mesh in context (`jax.set_mesh`) it
    does nothing.

    Of the mesh axes that shard an axis of the array, those count that divide its size together:
    three prompts on `data` 4 are on each device.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    spec = []
    for name, mesh_axes, size in zip(names, partition_spec(names), x.shape, strict=True):
        wanted = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        found = batch_axes(size) if name == "batch" else dividing_axes(wanted, size)
        spec.append(found or None)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*spec))


def param_shardings(
    boxed: Any,
    mesh: Mesh | AbstractMesh,
    *,
    shard_width: bool = True,
    width: str = "embed",
) -> Any:
    """Returns the sharding of each boxed (abstract) parameter.

    Args:
      boxed: parameters with their logical axes.
      mesh: the devices.
      shard_width: whether the width of the model is sharded as the table says; otherwise each
        device has all of it, as ZeRO levels below 3 have it.
      width: the row of the table that shards it.

    Raises:
      UserError: a mesh axis does not divide the array axis that it shards.
    """

    def sharding(path: tuple[Any, ...], box: nn.LogicallyPartitioned) -> NamedSharding:
        # Without its width the kernel ("expert", "embed", "mlp") is ("expert", None, "mlp").
        names = box.names
        if not shard_width:
            names = without_width(names)
        names = tuple(width if name == "embed" else name for name in names)
        shape = box.value.shape
        spec = parameter_spec(names, shape, mesh)
        for name, size, mesh_axes in zip(box.names, shape, spec, strict=True):
            check_divides(mesh, mesh_axes, size, f"{name} = {size} of {path_name(path)}")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=is_box)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of `[B, T]` arrays."""
    return NamedSharding(mesh, partition_spec(("batch", "length")))

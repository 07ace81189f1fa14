"""The one table from logical axis names to mesh axes, and what follows from it."""

import math
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from research.core.errors import UserError
from research.core.trees import path_name
from research.parallel.mesh_axes import BATCH_AXES, CONTEXT_AXIS, TENSOR_AXIS, WIDTH_AXES
from research.parallel.parameter import is_box

# First come, first served: a mesh axis that an earlier row took for the same array is not used
# again. Activations, whose batch takes `fsdp` and `expert` and whose length takes `context`, do not
# shard their width, while parameters do; those of experts shard it over what `expert` leaves.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", BATCH_AXES),
    ("length", (CONTEXT_AXIS,)),
    ("layers", ("pipeline",)),
    ("expert", ("expert",)),
    ("vocab", (TENSOR_AXIS,)),
    ("heads", (TENSOR_AXIS,)),
    ("kv_heads", (TENSOR_AXIS,)),
    ("mlp", (TENSOR_AXIS,)),
    ("embed", WIDTH_AXES),
    ("positions", ()),
    ("head", ()),
    ("latent", ()),
    ("rank", ()),
    ("router", ()),
    ("selection", ()),
    ("single", ()),
    ("types", ()),
    ("buckets", ()),
    ("classes", ()),
)


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


def constrain(x: Shaped[Array, "..."], names: tuple[str | None, ...]) -> Shaped[Array, "..."]:
    """Lays an activation out by its logical axes; without a mesh in context (`jax.set_mesh`) it
    does nothing.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names))


def param_shardings(boxed: Any, mesh: Mesh | AbstractMesh, *, shard_width: bool = True) -> Any:
    """Returns the sharding of each boxed (abstract) parameter.

    Args:
      boxed: parameters with their logical axes.
      mesh: the devices.
      shard_width: whether the width of the model is sharded as the table says; otherwise each
        device has all of it, as ZeRO levels below 3 have it.

    Raises:
      UserError: a mesh axis does not divide the array axis that it shards.
    """

    def sharding(path: tuple[Any, ...], box: nn.LogicallyPartitioned) -> NamedSharding:
        # Without its width the kernel ("expert", "embed", "mlp") is ("expert", None, "mlp").
        names = box.names
        if not shard_width:
            names = tuple(None if name == "embed" else name for name in names)
        spec = partition_spec(names)
        for name, size, mesh_axes in zip(box.names, box.value.shape, spec, strict=True):
            _check_divides(mesh, mesh_axes, size, f"{name} = {size} of {path_name(path)}")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=is_box)


def _check_divides(
    mesh: Mesh | AbstractMesh, mesh_axes: str | tuple[str, ...] | None, size: int, what: str
) -> None:
    """Raises UserError where mesh axes together do not divide a size.

    Args:
      mesh: the devices.
      mesh_axes: of a `PartitionSpec`, for one axis of an array.
      size: of that axis.
      what: it is, with its size.
    """
    if mesh_axes is None:
        return
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    # ("fsdp", "context", "expert") of sizes 4, 1 and 3: the error names fsdp and expert.
    used = [name for name in names if mesh.shape[name] > 1]
    shards = math.prod(mesh.shape[name] for name in used)
    if size % shards == 0:
        return
    fields = " × ".join(f"mesh.{name}" for name in used)
    together = "" if len(used) == 1 else " together"
    raise UserError(
        fields, shards, f"does not divide {what}. Use {_divisors(size, mesh.size)}{together}."
    )


def _divisors(size: int, limit: int) -> str:
    # 12 up to 8 -> "1, 2, 3, 4 or 6"
    *others, largest = [str(n) for n in range(1, limit + 1) if size % n == 0]
    if not others:
        return largest
    listed = ", ".join(others)
    return f"{listed} or {largest}"


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of `[B, T]` arrays."""
    return NamedSharding(mesh, partition_spec(("batch", "length")))


def check_batch(batch_size: int, length: int, accumulation: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError where the mesh cannot shard every microbatch evenly.

    Args:
      batch_size: rows of the batch, B.
      length: tokens of a row, T.
      accumulation: microbatches of the batch.
      mesh: the devices.
    """
    # data 2, fsdp 2 and 2 microbatches: 8 parts; of 20 rows there should be 16.
    parts = math.prod(mesh.shape[name] for name in BATCH_AXES) * accumulation
    if batch_size % parts:
        fields = " × ".join(f"mesh.{name}" for name in BATCH_AXES)
        rows_of_part = max(1, batch_size // parts)
        raise UserError(
            "train.batch_size",
            batch_size,
            f"is not a multiple of {fields} × train.accumulation = {parts}. Use "
            f"{rows_of_part * parts}.",
        )

    shards = mesh.shape[CONTEXT_AXIS]
    if length % shards:
        tokens_of_shard = max(1, length // shards)
        raise UserError(
            "train.sequence_length",
            length,
            f"is not a multiple of mesh.context = {shards}. Use {tokens_of_shard * shards}.",
        )

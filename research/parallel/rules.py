"""The one table from logical axis names to mesh axes, and what follows from it."""

from collections.abc import Collection
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped

from research.core.errors import UserError
from research.core.trees import path_name
from research.parallel.mesh_axes import BATCH_AXES, TENSOR_AXIS
from research.parallel.parameter import is_box

# First come, first served: a mesh axis that an earlier row took for the same array is not used
# again, so activations, whose batch takes `fsdp`, keep their width whole, while parameters shard
# it.
RULES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("batch", BATCH_AXES),
    ("length", ("context",)),
    ("layers", ("pipeline",)),
    ("expert", ("expert",)),
    ("vocab", (TENSOR_AXIS,)),
    ("heads", (TENSOR_AXIS,)),
    ("kv_heads", (TENSOR_AXIS,)),
    ("mlp", (TENSOR_AXIS,)),
    ("embed", ("fsdp",)),
    ("positions", ()),
    ("head", ()),
    ("latent", ()),
    ("rank", ()),
    ("router", ()),
    ("selection", ()),
    ("types", ()),
    ("buckets", ()),
    ("classes", ()),
)


def partition_spec(names: tuple[str | None, ...]) -> PartitionSpec:
    """Returns how an array with these logical axes lies on the mesh."""
    known = dict(RULES)
    unknown = [name for name in names if name is not None and name not in known]
    assert not unknown, f"logical axes {unknown} have no rule"
    spec: list[Any] = [None] * len(names)
    taken: set[str] = set()
    for name, mesh_axes in RULES:
        for i, axis in enumerate(names):
            if axis == name and mesh_axes and not taken & set(mesh_axes):
                spec[i] = mesh_axes if len(mesh_axes) > 1 else mesh_axes[0]
                taken |= set(mesh_axes)
    return PartitionSpec(*spec)


def constrain(x: Shaped[Array, "..."], names: tuple[str | None, ...]) -> Shaped[Array, "..."]:
    """Lays an activation out by its logical axes; without a mesh in context (`jax.set_mesh`) it
    does nothing.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(names))


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Returns the sharding of each boxed (abstract) parameter.

    Raises:
      UserError: a mesh axis does not divide the array axis that it shards.
    """

    def sharding(path: tuple[Any, ...], box: nn.LogicallyPartitioned) -> NamedSharding:
        spec = partition_spec(box.names)
        for name, size, mesh_axis in zip(box.names, box.value.shape, spec, strict=True):
            if mesh_axis is not None and size % mesh.shape[mesh_axis]:
                raise UserError(
                    f"mesh.{mesh_axis}",
                    mesh.shape[mesh_axis],
                    f"does not divide {name} = {size} of {path_name(path)}. Use "
                    f"{_divisors(size, mesh.size)}.",
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, boxed, is_leaf=is_box)


def _divisors(size: int, limit: int) -> str:
    fit = [str(n) for n in range(1, limit + 1) if size % n == 0]
    return ", ".join(fit[:-1]) + f" or {fit[-1]}" if len(fit) > 1 else fit[0]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of `[B, T]` arrays."""
    return NamedSharding(mesh, partition_spec(("batch", "length")))


def process_rows(
    sharding: NamedSharding, batch_size: int, devices: Collection[jax.Device] | None = None
) -> tuple[int, int]:
    """Returns (i, n): of a batch cut into n even parts, a process holds the rows of part i.

    Where an axis that does not share out the batch reaches over processes, several of them hold the
    same part.

    Args:
      sharding: from `batch_sharding`.
      batch_size: rows of the batch over all processes, B.
      devices: of the process; None is this one.

    Raises:
      UserError: the rows of the process's devices are no such part.
    """
    devices = sharding.addressable_devices if devices is None else devices
    whole = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0])).devices_indices_map(
        (batch_size,)
    )
    ranges = {whole[device][0].indices(batch_size)[:2] for device in devices}
    first, size = min(start for start, _ in ranges), sum(stop - start for start, stop in ranges)
    together = max(stop for _, stop in ranges) == first + size
    if not together or first % size or batch_size % size:
        raise UserError(
            "mesh.tensor",
            sharding.mesh.shape["tensor"],
            ": the rows of a process are no even part of the batch. Use a divisor or a multiple "
            "of the "
            f"{len(devices)} devices of a process.",
        )
    return first // size, batch_size // size


def process_columns(
    sharding: NamedSharding, length: int, devices: Collection[jax.Device] | None = None
) -> tuple[int, int]:
    """Returns (start, stop): of each row of a batch, the tokens that a process's devices hold.

    They are all of them where the length is not sharded over processes.

    Args:
      sharding: from `batch_sharding`.
      length: tokens of a row over all processes, T.
      devices: of the process; None is this one.

    Raises:
      UserError: the tokens do not follow each other.
    """
    devices = sharding.addressable_devices if devices is None else devices
    whole = NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[1])).devices_indices_map(
        (length,)
    )
    ranges = {whole[device][0].indices(length)[:2] for device in devices}
    start, stop = min(start for start, _ in ranges), max(stop for _, stop in ranges)
    if sum(stop - start for start, stop in ranges) != stop - start:
        raise UserError(
            "mesh.context",
            sharding.mesh.shape["context"],
            ": the tokens of a process do not follow each other in a row. Use a divisor or a "
            "multiple of the "
            f"{len(devices)} devices of a process.",
        )
    return start, stop


def check_batch(batch_size: int, accumulation: int, mesh: Mesh) -> None:
    """Raises UserError where the mesh cannot share out the rows of every microbatch evenly."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * accumulation
    if batch_size % parts:
        raise UserError(
            "train.batch_size",
            batch_size,
            f"is not a multiple of mesh.data × mesh.fsdp × train.accumulation = {parts}. Use "
            f"{max(1, batch_size // parts) * parts}.",
        )

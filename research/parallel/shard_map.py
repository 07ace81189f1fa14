"""`shard_map` over the mesh in context, for code that no partitioner can cut."""

import math
from collections.abc import Callable, Collection
from typing import Any

import jax


def sharding_axes(names: tuple[str, ...], *sizes: int) -> tuple[str, ...]:
    """Returns the mesh axes over which array axes are sharded: those of `names` in the mesh in
    context, or none.

    They are none where the mesh has only one device along them, or where together they do not
    divide every size.

    Args:
      names: mesh axes that may shard an array axis.
      sizes: of the array axes that are to be sharded in the same way.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in names if name in mesh.axis_names)
    shards = math.prod(mesh.shape[name] for name in axes)
    return axes if shards > 1 and not any(size % shards for size in sizes) else ()


def shard_map(
    body: Callable[..., Any], in_specs: Any, out_specs: Any, axes: Collection[str] | None = None
) -> Callable[..., Any]:
    """Returns `body`, called once a device under the mesh in context, on its shard of the
    arguments.

    Args:
      body: what no partitioner can cut.
      in_specs, out_specs: trees of `PartitionSpec`, as `jax.shard_map` takes them.
      axes: mesh axes that are the body's; the others stay with the partitioner. None is all of
          them.
    """
    own = {} if axes is None else {"axis_names": set(axes)}
    mapped = jax.shard_map(body, in_specs=in_specs, out_specs=out_specs, check_vma=False, **own)
    # Axes that shard nothing here stay with the partitioner, which only compiled code has.
    return jax.jit(mapped)

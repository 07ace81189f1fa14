"""How kernels that run once a device share out an array axis."""

import math
from collections.abc import Callable
from typing import Any

import jax


def shared_axes(names: tuple[str, ...], *sizes: int) -> tuple[str, ...]:
    """Returns those of `names` in the mesh in context, if together they divide every one of `sizes`: all or none.

    Args:
      names: mesh axes that may share out an array axis.
      sizes: of the array axes that are to be cut in the same way.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(name for name in names if name in mesh.axis_names)
    shares = math.prod(mesh.shape[name] for name in axes)
    return axes if shares > 1 and not any(size % shares for size in sizes) else ()


def once_a_device(body: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """Returns `body`, called once a device under the mesh in context, on its share of the arguments.

    Args:
      body: what no partitioner can cut.
      in_specs, out_specs: trees of `PartitionSpec`, as `jax.shard_map` takes them.
    """
    cut = jax.shard_map(body, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    # Axes that share out nothing here stay with the partitioner, which only compiled code has.
    return jax.jit(cut)

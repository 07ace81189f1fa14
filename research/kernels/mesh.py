"""How kernels that run once a device share out an array axis."""

import math

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

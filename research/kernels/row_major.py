"""Matrices that are row-major in memory, as matmul libraries need them.

XLA folds a transpose into the matmul that reads or produces it. On CPU that matmul then does not
use the library: half the speed in bfloat16, which is converted to float32 first or rejected at run
time, and a little less in float32.
"""

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Shaped

from research.parallel.target import platform


def row_major(x: Shaped[Array, "..."]) -> Shaped[Array, "..."]:
    """Returns `x` with its last axis contiguous in memory, then the one before it, and so on.

    It does so on CPU, and not under a mesh of several devices: the partitioner would gather `x` on
    each of them.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if platform() != "cpu" or mesh.size > 1:
        return x
    # Of 3 axes: (0, 1, 2), the first one outermost.
    axes = tuple(range(x.ndim))
    layout = Layout(major_to_minor=axes)
    return with_layout_constraint(x, layout)


def swap_last(x: Shaped[Array, "*batch rows columns"]) -> Shaped[Array, "*batch columns rows"]:
    """Returns `x` with its last two axes swapped, as a row-major copy."""
    swapped = x.swapaxes(-1, -2)
    return row_major(swapped)

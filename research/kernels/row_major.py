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
    if platform() != "cpu" or jax.sharding.get_abstract_mesh().size > 1:
        return x
    layout = Layout(major_to_minor=tuple(range(x.ndim)))
    return with_layout_constraint(x, layout)


def swap_last(x: Shaped[Array, "*batch rows columns"]) -> Shaped[Array, "*batch columns rows"]:
    """Returns `x` with its last two axes swapped, as a row-major copy."""
    return row_major(x.swapaxes(-1, -2))

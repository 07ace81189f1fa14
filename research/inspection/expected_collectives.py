"""Which large collectives the axes of a mesh call for."""

import itertools
from collections.abc import Iterator, Mapping

from research.parallel.mesh_axes import (
    CONTEXT_AXIS,
    DATA_AXIS,
    EXPERT_AXIS,
    PIPELINE_AXIS,
    TENSOR_AXIS,
    WIDTH_AXES,
)

# A kind, and the mesh axes along which it runs.
Expected = frozenset[tuple[str, tuple[str, ...]]]

# What the exchanges of attention, experts and pipelines consist of.
_OF_AXIS = {
    CONTEXT_AXIS: ("collective-permute", "all-gather", "reduce-scatter", "all-to-all"),
    EXPERT_AXIS: ("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter"),
    PIPELINE_AXIS: ("collective-permute", "all-reduce"),
    TENSOR_AXIS: ("all-reduce", "all-gather", "reduce-scatter"),
}


def expected_collectives(sizes: Mapping[str, int], zero: int) -> Expected:
    """Returns the kinds and axes of the large collectives of a training step.

    Args:
      sizes: of the mesh axes, outermost first.
      zero: level of `MeshConfig.zero`.
    """
    used = [axis for axis, size in sizes.items() if size > 1]
    found = set()
    for axis in used:
        for kind in _OF_AXIS.get(axis, ()):
            found.add((kind, (axis,)))

    # Parameters are gathered and gradients scattered along what shards the width, which a compiler
    # may do in steps, from device to device.
    for axes in _groups([axis for axis in used if axis in WIDTH_AXES]):
        found |= {("all-gather", axes), ("reduce-scatter", axes), ("collective-permute", axes)}
    # Sums of gradients over replicas; at level 1 all that see other tokens are.
    replicas = [DATA_AXIS, EXPERT_AXIS]
    if zero == 1:
        replicas += WIDTH_AXES
    for axes in _groups([axis for axis in used if axis in replicas]):
        found.add(("all-reduce", axes))
    return frozenset(found)


def _groups(axes: list[str]) -> Iterator[tuple[str, ...]]:
    # fsdp, expert -> (fsdp,), (expert,), (fsdp, expert)
    for count in range(1, len(axes) + 1):
        yield from itertools.combinations(axes, count)

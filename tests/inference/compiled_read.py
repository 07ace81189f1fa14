"""What a compiled step of an engine sends to other devices, and the largest array of its pages."""

import math

from research.bench.engine_steps import CompiledRead
from research.scaling.hlo import parse_module

MOVES = ("all-gather", "all-to-all", "collective-permute", "ragged-all-to-all")


def moved(found: CompiledRead) -> set[tuple[str, tuple[str, ...], int]]:
    """Kind, axes and elements of what goes to other devices without a sum."""
    return {
        (each.kind, each.axes, shape.size)
        for each in found.exchanged
        for shape in each.shapes
        if each.kind in MOVES
    }


def summed(found: CompiledRead) -> set[tuple[tuple[str, ...], int]]:
    """Axes and elements of what is added up over devices."""
    return {
        (each.axes, shape.size)
        for each in found.exchanged
        for shape in each.shapes
        if each.kind not in MOVES
    }


def largest_array_of_pages(found: CompiledRead) -> int:
    """Elements of the largest array of a device that has as many pages as there are, in one
    layer or in all of them.
    """
    counts = set()
    for leaf in found.pages:
        *stack, num_pages = leaf.shape[:-3]
        counts |= {num_pages, math.prod(stack) * num_pages}
    computations = parse_module(found.text).computations.values()
    instructions = [each for computation in computations for each in computation.instructions]
    shapes = [shape for each in instructions for shape in each.shapes]
    return max(shape.size for shape in shapes if counts & set(shape.dims))

"""The shapes that sharded arrays may have on one device, and those that they must not.

A compiled program has shapes without names. What the table shards is told by its sizes: `[L, D, F]`
on fsdp 4 and tensor 2 is `[L, D/4, F/2]` on a device, `[D, F/2]` inside of its layer, and any other
form of it is an accident.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator

import jax
from jax.sharding import PartitionSpec

from research.core.trees import named_leaves
from research.parallel.parameter import Axes, logical_axes
from research.parallel.rules import WIDTH_NAMES
from research.scaling.hlo import ArrayShape
from research.scaling.replica_groups import AnyMesh
from research.training.program import Program

_STACK = "layers"

# Sizes in order, without those of 1: axes are moved and merged freely by compilers.
Form = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class TableArray:
    """A parameter or an activation, and how the table of logical axes shards it.

    Attributes:
      name: for messages.
      names: logical names of its axes.
      shape: the whole of it.
      spec: how it is sharded.
      gathered: the axes that may be whole where it is used: a parameter's width, the length of
        keys.
    """

    name: str
    names: tuple[str | None, ...]
    shape: tuple[int, ...]
    spec: PartitionSpec
    gathered: tuple[str, ...] = ()

    @property
    def is_stack(self) -> bool:
        """Whether it is many layers' array."""
        return self.names[0] == _STACK and self.shape[0] > 1


def parameters(program: Program) -> list[TableArray]:
    """Returns the trainable parameters of a program, sharded as its state is."""
    boxed = jax.eval_shape(program.init, jax.random.key(0))
    trainable, _ = program.partition.split(boxed)
    axes: dict[str, Axes] = named_leaves(logical_axes(trainable))
    arrays = []
    for name, leaf in named_leaves(program.state.params).items():
        names = axes[name].names
        arrays.append(TableArray(name, names, leaf.shape, leaf.sharding.spec, WIDTH_NAMES))
    return arrays


def local_shape(array: TableArray, mesh: AnyMesh) -> tuple[int, ...]:
    """Returns the sizes of a device's part."""
    return tuple(sizes[0] for sizes in _sizes(array, mesh))


def allowed_forms(arrays: Iterable[TableArray], mesh: AnyMesh) -> set[Form]:
    """Returns the forms that arrays have on a device where all is well."""
    arrays = list(arrays)
    allowed = gathered_forms(arrays, mesh)
    for array in arrays:
        allowed |= _forms([[size] for size in local_shape(array, mesh)])
    return allowed


def gathered_forms(arrays: Iterable[TableArray], mesh: AnyMesh) -> set[Form]:
    """Returns the forms that parameters have where they are used: those of one layer."""
    forms = set()
    for array in arrays:
        sizes = []
        is_gathered = False
        for name, options in zip(array.names, _sizes(array, mesh), strict=True):
            may_gather = name in array.gathered
            sizes += [options] if may_gather else [options[:1]]
            is_gathered |= may_gather and len(options) > 1
        # Below ZeRO level 3 the width is whole at all times, in all layers.
        one_layer = array.is_stack and is_gathered
        if one_layer:
            del sizes[0]
        forms |= _forms(sizes)
    return forms


def accidental_forms(
    arrays: Iterable[TableArray], mesh: AnyMesh, num_layers: Iterable[int] = ()
) -> dict[Form, TableArray]:
    """Returns the forms that less sharded arrays would have, each with the array.

    Args:
      arrays: of a program.
      mesh: the devices.
      num_layers: layers that run as one loop, which keeps the activations of all of them.
    """
    arrays = list(arrays)
    found: dict[Form, TableArray] = {}
    for array in arrays:
        sizes = _sizes(array, mesh)
        forms = _forms(sizes)
        # A stack has all layers already.
        if not array.is_stack:
            for layers in num_layers:
                forms |= _forms([[layers], *sizes])
        for form in forms:
            found.setdefault(form, array)

    allowed = allowed_forms(arrays, mesh)
    for layers in num_layers:
        for array in arrays:
            local = local_shape(array, mesh)
            allowed |= _forms([[layers], *([size] for size in local)])
    return {form: array for form, array in found.items() if form not in allowed}


def forms_of(shape: ArrayShape) -> Form:
    """Returns the form of an array of a compiled program."""
    return _form(shape.dims)


def _sizes(array: TableArray, mesh: AnyMesh) -> list[list[int]]:
    """Returns the sizes that each axis may have, the most sharded one first."""
    # D = 64 over fsdp 4 and context 2: 8, 32 (fsdp gathered), 16 (context gathered), 64
    spec = [*array.spec, *[None] * (len(array.shape) - len(array.spec))]
    sizes = []
    for size, mesh_axes in zip(array.shape, spec, strict=True):
        axes = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes or ()
        shards = [mesh.shape[axis] for axis in axes]
        options = [size // math.prod(kept) for kept in _subsets(shards)]
        sizes.append(list(dict.fromkeys(options)))
    return sizes


def _subsets(values: list[int]) -> Iterator[tuple[int, ...]]:
    # All of them first: [4, 2] -> (4, 2), (4,), (2,), ()
    for count in range(len(values), -1, -1):
        yield from itertools.combinations(values, count)


def _forms(sizes: list[list[int]]) -> set[Form]:
    """Returns the forms of all choices of sizes, and those with two neighbours merged."""
    forms = set()
    for dims in itertools.product(*sizes):
        forms.add(_form(dims))
        for i in range(len(dims) - 1):
            # [B, T, D] -> [B T, D]
            merged = (*dims[:i], dims[i] * dims[i + 1], *dims[i + 2 :])
            forms.add(_form(merged))
    return forms


def _form(dims: tuple[int, ...]) -> Form:
    return tuple(sorted(size for size in dims if size > 1))

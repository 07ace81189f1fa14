"""One form of the layers on disk, whether they are scanned or unrolled in memory.

In memory an unrolled model has one subtree a layer (`layers_0`, `layers_1`, …) and a scanned model
one subtree `layers` whose leaves have a leading axis L. The stacked form is canonical: a scanned
model, the large kind, is then written and read without a copy, and only an unrolled one pays for
the stacking.

Trees travel here as flat dicts of slash-separated names (`core.trees.named_leaves`), so that
parameters and the mirrors of them inside an optimizer state are treated alike.
"""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from jaxtyping import Array

from research.core.trees import named_leaves

_LAYER = re.compile(r"(?P<before>(?:.*?/)?[^/]*layers)_(?P<index>\d+)/(?P<after>.*)")


def stack_layers(named: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `named` with the leaves of `layers_0`, `layers_1`, … stacked into one leaf of
    `layers` each.

    A leaf is stacked when every layer 0 … L - 1 has it in the same shape and type; what only some
    layers have stays as it is. Names that are canonical already pass through untouched, without a
    copy.

    Args:
      named: arrays, or their shapes as `jax.ShapeDtypeStruct`.

    Returns:
      arrays or shapes, as given; a stacked array is sharded as its layers are, and its new axis is
      not sharded.
    """
    stacks = _stacks(named)
    members = {name for names in stacks.values() for name in names}
    result = {name: leaf for name, leaf in named.items() if name not in members}
    parts = {stack: [named[name] for name in names] for stack, names in stacks.items()}
    shapes = {stack: _stacked_shape(leaves) for stack, leaves in parts.items()}
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in named.values()):
        return result | shapes
    shardings = {stack: shape.sharding for stack, shape in shapes.items()}
    return result | (jax.jit(_stack, out_shardings=shardings)(parts) if parts else {})


def unstack_layers(
    stacked: Mapping[str, Array], like: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, Array]:
    """Returns the arrays that `like` names, cut out of their canonical form; the inverse of
    `stack_layers`.

    Args:
      stacked: canonical arrays, at least those that `like` needs.
      like: shape and sharding of every wanted array, by its name in memory.
    """
    stacks = _stacks(like)
    result = {name: stacked[name] for name in like if name in stacked}
    parts = {stack: stacked[stack] for stack in stacks}
    if parts:
        shardings = {
            stack: [_sharding(like[name]) for name in names] for stack, names in stacks.items()
        }
        layers = jax.jit(_unstack, out_shardings=shardings)(parts)
        for stack, names in stacks.items():
            result.update(zip(names, layers[stack], strict=True))
    return {name: result[name] for name in like}


def canonical_names(named: Mapping[str, Any]) -> dict[str, tuple[str, int | None]]:
    """Returns where each leaf of an unrolled model lies on disk: the canonical name, and its
    layer's index there.

    The index is None where the leaf lies alone, not in a stack.
    """
    stacked = {
        name: (stack, i) for stack, names in _stacks(named).items() for i, name in enumerate(names)
    }
    return {name: stacked.get(name, (name, None)) for name in named}


def canonical(tree: Any) -> dict[str, Any]:
    """Returns the arrays (or shapes) of any tree, by name, as they lie on disk."""
    return stack_layers(named_leaves(tree))


def _stacks(named: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns canonical name -> the names of its layers, in order."""
    found: dict[str, dict[int, str]] = {}
    for name in named:
        match = _LAYER.fullmatch(name)
        if match:
            stack = f"{match['before']}/{match['after']}"
            found.setdefault(stack, {})[int(match["index"])] = name
    return {
        stack: [layers[i] for i in range(len(layers))]
        for stack, layers in found.items()
        if sorted(layers) == list(range(len(layers)))
        and len({(named[name].shape, named[name].dtype) for name in layers.values()}) == 1
    }


def _stacked_shape(leaves: list[Any]) -> jax.ShapeDtypeStruct:
    sharding = _sharding(leaves[0])
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(
            sharding.mesh, PartitionSpec(None, *sharding.spec), memory_kind=sharding.memory_kind
        )
    return jax.ShapeDtypeStruct((len(leaves), *leaves[0].shape), leaves[0].dtype, sharding=sharding)


def _sharding(leaf: Any) -> Sharding:
    if leaf.sharding is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return leaf.sharding


def _stack(parts: dict[str, list[Array]]) -> dict[str, Array]:
    return {stack: jnp.stack(leaves) for stack, leaves in parts.items()}


def _unstack(parts: dict[str, Array]) -> dict[str, list[Array]]:
    return {stack: [leaf[i] for i in range(leaf.shape[0])] for stack, leaf in parts.items()}

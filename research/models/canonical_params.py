"""One form of the layers on disk, whether they are scanned or unrolled in memory.

In memory an unrolled model has one subtree per layer (`layers_0`, `layers_1`, …), and a scanned
model has one subtree `layers` whose leaves have a leading axis L. The stacked form is canonical: a
scanned model, as large ones are, is then written and read without a copy of these layers, and only
an unrolled one pays for the stacking. `first_layers_i`, which are unrolled in both, are stacked in
the same way, into `first_layers`.

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

_LAYER = re.compile(r"(?P<subtree>(?:.*?/)?[^/]*layers)_(?P<index>\d+)/(?P<leaf>.*)")


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
    # {"layers/mlp/up": ["layers_0/mlp/up", "layers_1/mlp/up"]}
    stacks = _stacks(named)
    result = dict(named)
    layer_leaves = {}
    for stack, names in stacks.items():
        layer_leaves[stack] = [result.pop(name) for name in names]

    shapes = {stack: _stacked_shape(leaves) for stack, leaves in layer_leaves.items()}
    are_shapes = [isinstance(leaf, jax.ShapeDtypeStruct) for leaf in named.values()]
    if any(are_shapes):
        return result | shapes
    if not layer_leaves:
        return result
    shardings = {stack: shape.sharding for stack, shape in shapes.items()}
    stacked = jax.jit(_stack, out_shardings=shardings)(layer_leaves)
    return result | stacked


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
    stacked_leaves = {stack: stacked[stack] for stack in stacks}
    if stacked_leaves:
        shardings = {}
        for stack, names in stacks.items():
            shardings[stack] = [_sharding(like[name]) for name in names]
        layers = jax.jit(_unstack, out_shardings=shardings)(stacked_leaves)
        for stack, names in stacks.items():
            result.update(zip(names, layers[stack], strict=True))
    return {name: result[name] for name in like}


def canonical_names(named: Mapping[str, Any]) -> dict[str, tuple[str, int | None]]:
    """Returns the canonical name of each leaf of an unrolled model, and its layer's index in that
    stack.

    The index is None where the leaf is not in a stack.
    """
    # layers_1/mlp/up -> ("layers/mlp/up", 1), head/bias -> ("head/bias", None)
    found: dict[str, tuple[str, int | None]] = {name: (name, None) for name in named}
    for stack, names in _stacks(named).items():
        for index, name in enumerate(names):
            found[name] = (stack, index)
    return found


def canonical(tree: Any) -> dict[str, Any]:
    """Returns the arrays (or shapes) of any tree, by name, in the form on disk."""
    return stack_layers(named_leaves(tree))


def _stacks(named: Mapping[str, Any]) -> dict[str, list[str]]:
    """Returns canonical name -> the names of its layers' leaves, in order."""
    found: dict[str, dict[int, str]] = {}
    for name in named:
        match = _LAYER.fullmatch(name)
        if match:
            # decoder/layers_1/mlp/up -> stack decoder/layers/mlp/up, index 1
            stack = f"{match['subtree']}/{match['leaf']}"
            index = int(match["index"])
            found.setdefault(stack, {})[index] = name

    stacks = {}
    for stack, layers in found.items():
        indices = list(range(len(layers)))
        has_all_layers = sorted(layers) == indices
        leaves = [named[name] for name in layers.values()]
        types = {(leaf.shape, leaf.dtype) for leaf in leaves}
        if has_all_layers and len(types) == 1:
            stacks[stack] = [layers[index] for index in indices]
    return stacks


def _stacked_shape(leaves: list[Any]) -> jax.ShapeDtypeStruct:
    sharding = _sharding(leaves[0])
    if isinstance(sharding, NamedSharding):
        # The new axis is not sharded.
        spec = PartitionSpec(None, *sharding.spec)
        sharding = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    shape = (len(leaves), *leaves[0].shape)
    return jax.ShapeDtypeStruct(shape, leaves[0].dtype, sharding=sharding)


def _sharding(leaf: Any) -> Sharding:
    if leaf.sharding is None:
        return jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return leaf.sharding


def _stack(layer_leaves: dict[str, list[Array]]) -> dict[str, Array]:
    return {stack: jnp.stack(leaves) for stack, leaves in layer_leaves.items()}


def _unstack(stacked_leaves: dict[str, Array]) -> dict[str, list[Array]]:
    layers = {}
    for stack, leaf in stacked_leaves.items():
        num_layers = leaf.shape[0]
        layers[stack] = [leaf[i] for i in range(num_layers)]
    return layers

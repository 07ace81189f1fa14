"""Where a step has gradients, and what it updates: what a ZeRO level means for it."""

import dataclasses
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from research.parallel.rules import param_shardings


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shardings of the trees of a step that have the structure of the parameters.

    Each of them is None where nobody says: there is no mesh, or the partitioner chooses.

    Attributes:
      gradients: of the gradients, and of their sum over microbatches.
      update: of gradients and parameters in the optimizer, whose state has the same shardings.
    """

    gradients: Any = None
    update: Any = None


NO_LAYOUT = Layout()


def zero_layout(boxed: Any, mesh: Mesh | AbstractMesh, zero: int) -> Layout:
    """Returns the layout of a ZeRO level.

    Args:
      boxed: abstract trainable parameters with their logical axes.
      mesh: the devices.
      zero: the level, as of `MeshConfig`.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    sharded = param_shardings(boxed, mesh)
    replicated = param_shardings(boxed, mesh, shard_width=False)
    gradients = replicated if zero == 1 else sharded
    return Layout(gradients, update=sharded)


def constrain_tree(tree: Any, shardings: Any) -> Any:
    """Lays out the arrays of a tree; without shardings it does nothing."""
    if shardings is None:
        return tree
    return jax.tree.map(jax.lax.with_sharding_constraint, tree, shardings)

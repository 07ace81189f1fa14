"""Shapes, types and shardings of what a program takes, without arrays."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from research.parallel.rules import batch_sharding, param_shardings
from research.training.state import TrainState
from research.training.step import AbstractBatch


def abstract_batch(shapes: Mapping[str, tuple[tuple[int, ...], str]], mesh: Mesh) -> AbstractBatch:
    """Returns shapes, types and sharding of a batch."""
    sharding = batch_sharding(mesh)
    return {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}


def abstract_saved(boxed: Any, state: TrainState, mesh: Mesh, zero: int) -> TrainState:
    """Returns shapes, types and shardings of the state with all parameters."""
    params = abstract_params(boxed, mesh, shard_width=zero == 3)
    ema = None
    if state.ema is not None:
        ema = abstract_params(boxed, mesh, shard_width=True)
    return state.replace(params=params, ema=ema)


def abstract_params(boxed: Any, mesh: Mesh, *, shard_width: bool) -> Any:
    """Returns shapes, types and shardings of boxed parameters."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        nn.unbox(boxed),
        param_shardings(boxed, mesh, shard_width=shard_width),
    )


def shardings_of(abstract: Any) -> Any:
    """Returns the shardings of abstract arrays."""
    return jax.tree.map(lambda leaf: leaf.sharding, abstract)

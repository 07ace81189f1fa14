"""What a run carries from step to step."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from research.core.trees import named_leaves, path_name
from research.parallel.rules import param_shardings


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint must hold for the run to go on bit for bit.

    The fields have no shapes: the same tree also holds shapes, shardings and names in place of its
        arrays.

    Attributes:
      step: batches taken so far, skipped ones included; int32, as the other counters.
      params: parameters, in the type that the model names.
      opt_state: of the optimizer.
      ema: averaged parameters, or None.
      skipped: steps skipped for a loss or gradient that was not finite.
      skipped_in_row: how many of them just now, one after the other.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any
    skipped: Any
    skipped_in_row: Any

    def eval_params(self) -> Any:
        """Returns the parameters to evaluate: the average where there is one."""
        return self.params if self.ema is None else self.ema

    def advance(
        self, params: Any, opt_state: Any, ema: Any, finite: Bool[Array, ""]
    ) -> "TrainState":
        """Returns the state after a step: with the new values where it was finite, with the old
        ones where not.
        """
        old = (self.params, self.opt_state, self.ema)
        params, opt_state, ema = jax.tree.map(
            lambda new, kept: jnp.where(finite, new, kept), (params, opt_state, ema), old
        )
        bad = 1 - finite.astype(jnp.int32)
        return TrainState(
            step=self.step + 1,
            params=params,
            opt_state=opt_state,
            ema=ema,
            skipped=self.skipped + bad,
            skipped_in_row=(self.skipped_in_row + 1) * bad,
        )


def new_state(params: Any, optimizer: optax.GradientTransformation, keep_ema: bool) -> TrainState:
    """Returns the state of step 0."""

    # Each counter is its own array: a donated buffer must not stand in two places.
    def zero() -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)

    ema = jax.tree.map(jnp.copy, params) if keep_ema else None
    return TrainState(zero(), params, optimizer.init(params), ema, zero(), zero())


def state_shardings(state: TrainState, boxed: Any, mesh: Mesh) -> TrainState:
    """Returns the sharding of every array of an abstract state.

    An array of the optimizer or the average that stands for a parameter (its path ends in the
    parameter's, its shape is the same) lies as that parameter does; counters and factored moments
    are on every device.

    Args:
      state: shapes, as `jax.eval_shape` gives them.
      boxed: abstract parameters with their logical axes.
      mesh: where it lies.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    shardings = named_leaves(param_shardings(boxed, mesh))
    shapes = {name: leaf.shape for name, leaf in named_leaves(state.params).items()}
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        for start in range(len(path)):
            name = path_name(path[start:])
            if name in shardings and shapes[name] == leaf.shape:
                return shardings[name]
        return replicated

    return jax.tree_util.tree_map_with_path(sharding, state)


def abstract_state(
    boxed: Any, optimizer: optax.GradientTransformation, mesh: Mesh, *, keep_ema: bool
) -> TrainState:
    """Returns the state's shapes, types and shardings, without an array.

    Args:
      boxed: abstract parameters with their logical axes.
      optimizer: whose state it holds.
      mesh: where it lies.
      keep_ema: whether averaged parameters are kept.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    state = jax.eval_shape(lambda params: new_state(params, optimizer, keep_ema), nn.unbox(boxed))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(state, boxed, mesh),
    )


def create_state(
    init: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    key: jax.Array,
) -> TrainState:
    """Returns the state of step 0, every array made where `abstract` puts it; the mesh changes no
    value.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = jax.jit(
        lambda key: new_state(nn.unbox(init(key)), optimizer, abstract.ema is not None),
        out_shardings=shardings,
    )
    return make(key)

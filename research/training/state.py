"""What a run carries from step to step."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Int

from research.core.trees import named_leaves, path_name
from research.parallel.rules import param_shardings


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint must hold for the run to resume bit for bit.

    The fields have no shapes in their types: a tree of the same fields also holds shapes, shardings
    or names.

    Attributes:
      step: batches taken so far, skipped ones included; int32, as the other counters.
      params: parameters, in the type that the model names.
      opt_state: of the optimizer.
      ema: averaged parameters, or None.
      skipped: steps skipped for a loss or gradient that was not finite.
      skipped_in_row: how many of the last steps, one after the other, were skipped.
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
        """Returns the state after a step: with the new values where it was finite, or the old."""
        old = (self.params, self.opt_state, self.ema)
        new = (params, opt_state, ema)
        params, opt_state, ema = jax.tree.map(
            lambda updated, kept: jnp.where(finite, updated, kept), new, old
        )
        # 1 for a skipped step, or 0
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

    # Each counter is its own array: a donated buffer must not occur twice.
    def zero() -> Int[Array, ""]:
        return jnp.zeros((), jnp.int32)

    # A copy for the same reason.
    ema = None
    if keep_ema:
        ema = jax.tree.map(jnp.copy, params)
    return TrainState(
        step=zero(),
        params=params,
        opt_state=optimizer.init(params),
        ema=ema,
        skipped=zero(),
        skipped_in_row=zero(),
    )


def state_shardings(
    state: TrainState, boxed: Any, mesh: Mesh | AbstractMesh, zero: int
) -> TrainState:
    """Returns the sharding of every array of an abstract state.

    Whether the width of parameters is sharded depends on the ZeRO level. An array of the optimizer
    or the average that belongs to a parameter (its path ends in the parameter's, its shape is the
    same) is sharded as the table says for it; counters and factored moments are replicated.

    Args:
      state: shapes, as `jax.eval_shape` gives them.
      boxed: abstract parameters with their logical axes.
      mesh: the devices.
      zero: the level, as of `MeshConfig`.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    shardings = named_leaves(param_shardings(boxed, mesh))
    shapes = {name: leaf.shape for name, leaf in named_leaves(state.params).items()}
    replicated = NamedSharding(mesh, PartitionSpec())

    def sharding(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        # opt_state/mu/embed/embedding: mu/embed/embedding, then embed/embedding, a parameter
        for start in range(len(path)):
            name = path_name(path[start:])
            if name in shardings and shapes[name] == leaf.shape:
                return shardings[name]
        return replicated

    by_table = jax.tree_util.tree_map_with_path(sharding, state)
    return by_table.replace(params=param_shardings(boxed, mesh, shard_width=zero == 3))


def abstract_state(
    boxed: Any,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | AbstractMesh,
    *,
    keep_ema: bool,
    zero: int = 3,
) -> TrainState:
    """Returns the state's shapes, types and shardings, without an array.

    Args:
      boxed: abstract parameters with their logical axes.
      optimizer: whose state it holds.
      mesh: the devices.
      keep_ema: whether averaged parameters are kept.
      zero: the level, as of `MeshConfig`.

    Raises:
      UserError: the mesh does not divide a parameter.
    """
    state = jax.eval_shape(lambda params: new_state(params, optimizer, keep_ema), nn.unbox(boxed))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        state_shardings(state, boxed, mesh, zero),
    )


def create_state(
    init: Callable[[jax.Array], Any],
    optimizer: optax.GradientTransformation,
    abstract: TrainState,
    key: jax.Array,
) -> TrainState:
    """Returns the state of step 0, each array created in the sharding that `abstract` has.

    The values do not depend on the mesh.
    """

    keep_ema = abstract.ema is not None

    def make(key: jax.Array) -> TrainState:
        params = nn.unbox(init(key))
        return new_state(params, optimizer, keep_ema)

    # Each device makes its own part: no device ever holds a complete array that is sharded.
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(make, out_shardings=shardings)(key)

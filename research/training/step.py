"""A loss and an optimizer become `step(state, frozen, batch) -> (state, metrics)`."""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from research.core.promotion import promoting
from research.core.random import step_key
from research.data.batch import Batch
from research.models.reports import ExpertCounts
from research.optim.balancing import balance_experts, selection_bias
from research.parallel.process_parts import process_columns
from research.training.gradients import Loss, Metrics, Report
from research.training.layout import NO_LAYOUT, Layout, constrain_tree
from research.training.partition import EVERYTHING, Partition
from research.training.state import TrainState

AbstractBatch = dict[str, jax.ShapeDtypeStruct]
Step = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


@runtime_checkable  # so that the tests' checks of types can look at it
class MeanGradients(Protocol):
    """How a step gets gradients: by `gradients.mean_gradients`, or through a pipeline."""

    def __call__(
        self,
        trainable: Any,
        frozen: Any,
        batch: Batch,
        weight: Float[Array, ""],
        key: jax.Array,
    ) -> tuple[Float[Array, ""], Report, Any]:
        """Returns what is minimized, the report and the gradients: means over the whole batch."""


def _global_norm(gradients: Any) -> Float[Array, ""]:
    """Returns the norm of all gradients together.

    It is taken in float32, whatever the gradients are in: a sum of squares needs its digits.
    """
    in_float32 = jax.tree.map(lambda g: g.astype(jnp.float32), gradients)
    return optax.global_norm(in_float32)


def _clip(gradients: Any, norm: Float[Array, ""], largest: float | None) -> Any:
    """Returns the gradients scaled down to a largest global norm, where there is one."""
    if largest is None:
        return gradients
    # Norm 4, largest 1 -> 1 / 4; norm 0.5 -> 1
    norm = jnp.maximum(norm, 1e-12)
    scale = jnp.minimum(1.0, largest / norm)

    # In float32, and rounded once to the gradient's own type.
    def scaled(gradient: Array) -> Array:
        product = gradient.astype(jnp.float32) * scale
        return product.astype(gradient.dtype)

    return jax.tree.map(scaled, gradients)


def _update(
    optimizer: optax.GradientTransformation, gradients: Any, state: TrainState, shardings: Any
) -> tuple[Any, Any]:
    """Returns the parameters and the optimizer's state after an update.

    Each device updates the part that `shardings` give it, even where it has everything.
    """
    gradients = constrain_tree(gradients, shardings)
    params = constrain_tree(state.params, shardings)
    updates, opt_state = optimizer.update(gradients, state.opt_state, params)
    apply_updates = promoting(optax.apply_updates)
    return apply_updates(params, updates), opt_state


def _update_ema(ema: Any, params: Any, decay: float | None) -> Any:
    """Returns the averages moved towards new parameters, e + (1 - decay) (p - e), where there are
    averages.
    """
    if ema is None:
        return None
    rate = 1 - decay

    # decay · e + rate · p would not keep an average that equals its parameter bit for bit.
    def moved(average: Array, param: Array) -> Array:
        change = param - average
        return average + rate * change

    return jax.tree.map(moved, ema, params)


def _balance_experts(
    params: Any, experts: Mapping[str, ExpertCounts], speed: float, partition: Partition
) -> Any:
    """Returns the parameters with selection biases moved by the expert load of their own layers."""
    if not speed:
        return params
    # Where n of L stacked layers are trained, their biases are [n, E]: load [L, E] -> [n, E]
    load = {}
    for path, counts in experts.items():
        load[path] = partition.trained_rows(selection_bias(path), counts.load)
    return balance_experts(params, load, speed)


def _step_metrics(
    report: Report,
    weight: Float[Array, ""],
    norm: Float[Array, ""],
    learning_rate: float | Float[Array, ""],
    batch: Batch,
    state: TrainState,
) -> Metrics:
    """Returns what a step reports; `state` is the one after it."""
    of_experts: Metrics = {}
    for path, counts in report.experts.items():
        of_experts |= counts.metrics(path)
    return {
        **report.sums,
        **report.means,
        **of_experts,
        "grad_norm": norm,
        "learning_rate": jnp.asarray(learning_rate, jnp.float32),
        "weight": weight.astype(jnp.float32),
        "tokens": jnp.sum(batch["segments"] != 0).astype(jnp.float32),
        "skipped": state.skipped.astype(jnp.float32),
        "skipped_in_row": state.skipped_in_row.astype(jnp.float32),
    }


def make_train_step(
    loss: Loss,
    gradients_of: MeanGradients,
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Any], Float[Array, ""]],
    key: jax.Array,
    *,
    partition: Partition = EVERYTHING,
    expert_bias_speed: float = 0.0,
    clip_norm: float | None = None,
    ema_decay: float | None = None,
    layout: Layout = NO_LAYOUT,
) -> Step:
    """Returns the pure training step, which changes the state's parameters and nothing frozen.

    A step whose loss or gradient is not finite changes no parameter and no optimizer state; it is
    counted, and its batch is not used again.

    Args:
      loss: what is minimized, as it says what a batch weighs.
      gradients_of: takes the gradients of the loss.
      optimizer: applied to the gradient.
      learning_rate: of the optimizer's next update, from the optimizer's state; for the log.
      key: root of the run's dropout; each step's key is a function of it and the step.
      partition: which parameters are trained.
      expert_bias_speed: how far a step moves experts' selection biases towards an even load.
      clip_norm: largest global norm of the gradient, or None.
      ema_decay: of the averaged parameters, where the state has them.
      layout: of gradients, and of what an update takes, on a mesh.
    """

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        dropout_key = step_key(key, state.step)
        weight = loss.weight(batch)
        value, report, grads = gradients_of(state.params, frozen, batch, weight, dropout_key)

        # The norm before clipping is the one that is logged.
        norm = _global_norm(grads)
        grads = _clip(grads, norm, clip_norm)
        params, opt_state = _update(optimizer, grads, state, layout.update)
        params = _balance_experts(params, report.experts, expert_bias_speed, partition)
        ema = _update_ema(state.ema, params, ema_decay)

        rate = learning_rate(state.opt_state)
        # One number that is not finite in any gradient makes their norm not finite.
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        state = state.advance(params, opt_state, ema, finite)
        return state, _step_metrics(report, weight, norm, rate, batch, state)

    return step


def shard_batch(batch: Batch, like: AbstractBatch) -> Batch:
    """Puts this process's rows of a batch on its devices, as part of the global batch.

    Args:
      batch: complete rows, those of `parallel.rules.process_rows`; of each the devices get the
          tokens that they hold.
      like: shapes, types and shardings of the global batch.
    """
    placed = {}
    for name, array in batch.items():
        sharding = like[name].sharding
        shape = like[name].shape
        # Tokens [B, 8] sharded over two processes: columns 4 … 7 on the second one
        start, stop = process_columns(sharding, shape[1])
        columns = array[:, start:stop]
        placed[name] = jax.make_array_from_process_local_data(sharding, columns, shape)
    return placed


def make_eval_step(loss: Loss) -> Callable[[Any, Any, Batch], Metrics]:
    """Returns `step(trainable, frozen, batch) -> sums`: the reported losses and their weight."""

    def step(trainable: Any, frozen: Any, batch: Batch) -> Metrics:
        # Without a key there is no dropout.
        _, report = loss.sums(trainable, frozen, batch, None)
        weight = loss.weight(batch)
        return {**report.sums, "weight": weight}

    return step

"""A loss and an optimizer become `step(state, frozen, batch) -> (state, metrics)`."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from research.core.promotion import promoting
from research.core.random import step_key
from research.data.batch import Batch
from research.models.reports import ExpertCounts
from research.optim.balancing import balance_experts, selection_bias
from research.parallel.rules import process_columns
from research.training.layout import NO_LAYOUT, Layout, constrain_tree
from research.training.partition import EVERYTHING, Partition
from research.training.state import TrainState

AbstractBatch = dict[str, jax.ShapeDtypeStruct]
Metrics = dict[str, Float[Array, ""]]
Step = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


class Report(NamedTuple):
    """What a loss returns beside its sum. A step adds it up over microbatches.

    Attributes:
      sums: for the log; divided by the weight of the whole batch, as the loss's own sum is.
      means: losses that are means already (the router loss). They are minimized too; the step takes
        their mean over microbatches.
      experts: counts of each layer's experts, by the path of their parameters.
    """

    sums: Metrics
    means: Metrics
    experts: dict[str, ExpertCounts]


@runtime_checkable  # so that the tests' checks of types can look at it
class Loss(Protocol):
    """What a run minimizes: a sum over a batch, divided by a weight that the loss defines."""

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """Returns the denominator: how many tokens, sequences, pairs or prompts the batch holds, or
        a constant.

        A step asks for it once, over the whole batch, before microbatches and devices see their
        parts.
        """

    def sums(
        self, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None
    ) -> tuple[Float[Array, ""], Report]:
        """Returns the sum over a batch, or over a part of it, and the report.

        Args:
          trainable: the parameters that the step differentiates.
          frozen: what else is read: parameters that stay as they are, a teacher.
          batch: of arrays on the devices.
          key: of dropout; None is deterministic.
        """


def _microbatch(batch: Batch, index: int | Int[Array, ""], count: int) -> Batch:
    """Returns every `count`-th row of a batch, from row `index` on.

    A device's rows are consecutive, so each microbatch has equally many of them from each device.
    """
    rows = {}
    for name, array in batch.items():
        # [B, T] -> [B / count, count, T] -> [B / count, T]
        groups = array.reshape(-1, count, *array.shape[1:])
        rows[name] = groups[:, index]
    return rows


def _mean_gradients(
    loss: Loss,
    trainable: Any,
    frozen: Any,
    batch: Batch,
    weight: Float[Array, ""],
    key: jax.Array,
    *,
    accumulation: int,
    unroll: bool,
    shardings: Any,
) -> tuple[Float[Array, ""], Report, Any]:
    """Returns what is minimized, the report and the gradients: means over the whole batch.

    The report's experts are counts, no means. Gradients, and their sum over microbatches, are laid
    out by `shardings`.
    """
    # A batch of padding alone has weight 0, and a loss of 0 and not of 0 / 0.
    weight = jnp.where(weight > 0, weight, 1.0)

    # Its values, for the microbatches of a batch, add up to the mean over the batch.
    def mean_loss(trainable: Any, micro: Batch, key: jax.Array) -> tuple[Float[Array, ""], Report]:
        total, report = loss.sums(trainable, frozen, micro, key)
        means = _divided(report.means, accumulation)
        sums = _divided(report.sums, weight)
        minimized = sum(means.values(), start=total / weight)
        report = Report(sums, means, report.experts)
        return minimized, report

    value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)

    def gradient(trainable: Any, micro: Batch, key: jax.Array) -> tuple[Any, Any]:
        result, grads = value_and_grad(trainable, micro, key)
        return result, constrain_tree(grads, shardings)

    if accumulation == 1:
        (value, report), grads = gradient(trainable, batch, key)
        return value, report, grads

    # One microbatch of the scan: all that it returns is summed, the gradients too.
    def add(total: Any, index: Array) -> tuple[Any, None]:
        micro = _microbatch(batch, index, accumulation)
        # Each microbatch has its own dropout.
        micro_key = jax.random.fold_in(key, index)
        result = gradient(trainable, micro, micro_key)
        total = jax.tree.map(jnp.add, total, result)
        return total, None

    # Traced, not computed: only the shapes of ((value, report), gradients) are needed.
    first = _microbatch(batch, 0, accumulation)
    shapes = jax.eval_shape(gradient, trainable, first, key)
    result, sums = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    zeros = (result, constrain_tree(sums, shardings))

    indices = jnp.arange(accumulation)
    total, _ = jax.lax.scan(add, zeros, indices, unroll=unroll)
    (value, report), grads = total
    return value, report, grads


def _divided(values: Metrics, divisor: int | Float[Array, ""]) -> Metrics:
    return {name: value / divisor for name, value in values.items()}


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
    optimizer: optax.GradientTransformation,
    learning_rate: Callable[[Any], Float[Array, ""]],
    key: jax.Array,
    *,
    partition: Partition = EVERYTHING,
    expert_bias_speed: float = 0.0,
    clip_norm: float | None = None,
    ema_decay: float | None = None,
    accumulation: int = 1,
    unroll: bool = False,
    layout: Layout = NO_LAYOUT,
) -> Step:
    """Returns the pure training step, which changes the state's parameters and nothing frozen.

    A step whose loss or gradient is not finite changes no parameter and no optimizer state; it is
    counted, and its batch is not used again.

    Args:
      loss: what is minimized; its sums are divided by the weight of the whole batch.
      optimizer: applied to the gradient.
      learning_rate: of the optimizer's next update, from the optimizer's state; for the log.
      key: root of the run's dropout; each step's key is a function of it and the step.
      partition: which parameters are trained.
      expert_bias_speed: how far a step moves experts' selection biases towards an even load.
      clip_norm: largest global norm of the gradient, or None.
      ema_decay: of the averaged parameters, where the state has them.
      accumulation: microbatches of a batch.
      unroll: compile microbatches one by one, not as a loop, whose body is slow on XLA for CPU.
      layout: of gradients, and of what an update takes, on a mesh.
    """
    mean_gradients = functools.partial(
        _mean_gradients,
        loss,
        accumulation=accumulation,
        unroll=unroll,
        shardings=layout.gradients,
    )

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        dropout_key = step_key(key, state.step)
        weight = loss.weight(batch)
        value, report, grads = mean_gradients(state.params, frozen, batch, weight, dropout_key)

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

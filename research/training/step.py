"""Step builders: a loss and an optimizer become `step(state, batch) -> (state, metrics)`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from research.core.random import step_key
from research.data.batch import Batch
from research.kernels.cross_entropy import summed_cross_entropy
from research.losses.token import weighted_sum, z_loss
from research.models.heads import shift_left
from research.models.language_model import LanguageModelConfig, language_model
from research.parallel.rules import process_columns
from research.parallel.target import platform
from research.training.state import TrainState

AbstractBatch = dict[str, jax.ShapeDtypeStruct]
Metrics = dict[str, Float[Array, ""]]
# Sums over the tokens of a batch: what to minimize, and what to report.
Loss = Callable[[Any, Batch, jax.Array | None], tuple[Float[Array, ""], Metrics]]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


def language_model_loss(config: LanguageModelConfig, z_coefficient: float = 0.0, label_smoothing: float = 0.0) -> Loss:
    """Returns the weighted cross-entropy of a model, in nats, summed over tokens, plus the terms that training adds.

    These are z-loss, the experts' router loss and the loss of tokens further on, where the config has them; of the last
    the plain mean over the depths is reported. The output projection is taken in chunks, so float32 logits of the whole
    batch never exist. A loss called without a key is deterministic: no dropout.

    Args:
      config: the model.
      z_coefficient: of the z-loss, 0 for none.
      label_smoothing: in [0, 1), part of the reported loss; 0 leaves it plain, as evaluation needs it.
    """
    model = language_model(config)

    def objective(nll: Array, log_z: Array, weights: Array) -> tuple[Float[Array, ""], Metrics]:
        nll_sum = weighted_sum(nll, weights)
        z_sum = weighted_sum(z_loss(log_z, z_coefficient), weights) if z_coefficient else jnp.zeros(())
        return nll_sum + z_sum, {"loss": nll_sum, "z_loss": z_sum}

    def loss(params: Any, batch: Batch, key: jax.Array | None) -> tuple[Float[Array, ""], Metrics]:
        output = model.hidden(params, batch, key=key)

        def of_states(hidden: Array, targets: Array, weights: Array) -> tuple[Float[Array, ""], Metrics]:
            terms = model.projection(params, hidden)
            options = {"softcap": terms.softcap, "label_smoothing": label_smoothing}
            return summed_cross_entropy(objective, terms.hidden, terms.kernel, targets, weights, **options)

        total, sums = of_states(output.hidden, batch["targets"], batch["weights"])
        later = [of_states(hidden, *_further(batch, depth)) for depth, hidden in enumerate(output.mtp_hidden, start=1)]
        if later:
            total = total + output.mtp_weight * sum(each for each, _ in later) / len(later)
            sums = {**sums, "future_loss": sum(those["loss"] for _, those in later) / len(later)}
        if output.reports.expert_load:
            # Of a batch's mean, for the step divides by its weight.
            routed = output.reports.router_loss * jnp.sum(batch["weights"])
            total, sums = total + routed, {**sums, "router_loss": routed}
        return total, sums

    return loss


def _further(batch: Batch, depth: int) -> tuple[Int[Array, "B T"], Float[Array, "B T"]]:
    """Returns the targets that are `depth` places further on, and their weights: 0 past the end of a sequence."""
    same = shift_left(batch["segments"], depth) == batch["segments"]
    weights = jnp.where(same, shift_left(batch["weights"], depth), 0.0)
    return shift_left(batch["targets"], depth), weights


def _microbatch(batch: Batch, index: int | Int[Array, ""], count: int) -> Batch:
    """Returns every `count`-th row: each device's share of the batch gives as many rows to each microbatch."""
    return {name: array.reshape(-1, count, *array.shape[1:])[:, index] for name, array in batch.items()}


def _sum_gradients(
    loss: Loss, params: Any, batch: Batch, key: jax.Array, total: Float[Array, ""], accumulation: int
) -> tuple[Float[Array, ""], Metrics, Any]:
    """Returns objective, metrics and gradients, all divided by the weight of the whole batch."""

    def scaled(params: Any, micro: Batch, key: jax.Array) -> tuple[Float[Array, ""], Metrics]:
        objective, sums = loss(params, micro, key)
        return objective / total, jax.tree.map(lambda value: value / total, sums)

    gradient = jax.value_and_grad(scaled, has_aux=True)
    if accumulation == 1:
        (objective, sums), grads = gradient(params, batch, key)
        return objective, sums, grads

    def add(carry: Any, index: Array) -> tuple[Any, None]:
        (objective, sums), grads = gradient(
            params, _microbatch(batch, index, accumulation), jax.random.fold_in(key, index)
        )
        return jax.tree.map(jnp.add, carry, (objective, sums, grads)), None

    (objective, sums), grads = jax.eval_shape(gradient, params, _microbatch(batch, 0, accumulation), key)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), (objective, sums, grads))
    # A loop body runs slowly on XLA for CPU, so there the microbatches are written out.
    unroll = accumulation if platform() == "cpu" else 1
    (objective, sums, grads), _ = jax.lax.scan(add, zeros, jnp.arange(accumulation), unroll=unroll)
    return objective, sums, grads


def make_train_step(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    key: jax.Array,
    *,
    norm_of: Callable[[Any], Float[Array, ""]] = optax.global_norm,
    clip_norm: float | None = None,
    ema_decay: float | None = None,
    accumulation: int = 1,
) -> Step:
    """Returns the pure training step.

    A step whose loss or gradient is not finite changes no parameter and no optimizer state; it is counted, and its
    batch is gone.

    Args:
      loss: sums over tokens; the step divides by the batch's weight, whatever the accumulation.
      optimizer: applied to the mean gradient.
      schedule: of the learning rate, for the log.
      key: root of the run's dropout; each step's key is a function of it and the step.
      norm_of: the norm of a gradient.
      clip_norm: largest global norm of the gradient, or None.
      ema_decay: of the averaged parameters, where the state has them.
      accumulation: microbatches that the batch is taken in; divides the batch size.
    """

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        total = jnp.sum(batch["weights"])
        total = jnp.where(total > 0, total, 1.0)
        objective, sums, grads = _sum_gradients(
            loss, state.params, batch, step_key(key, state.step), total, accumulation
        )
        norm = norm_of(grads)
        if clip_norm is not None:
            scale = jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
            grads = jax.tree.map(lambda g: g * scale, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = jax.tree.map(lambda average, new: average + (1 - ema_decay) * (new - average), ema, params)

        rate = schedule(state.step - state.skipped)
        finite = jnp.isfinite(objective) & jnp.isfinite(norm)
        state = state.advance(params, opt_state, ema, finite)
        metrics = {
            **sums,
            "grad_norm": norm,
            "learning_rate": jnp.asarray(rate, jnp.float32),
            "tokens": jnp.sum(batch["segments"] != 0).astype(jnp.float32),
            "skipped": state.skipped.astype(jnp.float32),
            "skipped_in_row": state.skipped_in_row.astype(jnp.float32),
        }
        return state, metrics

    return step


def place_batch(batch: Batch, like: AbstractBatch) -> Batch:
    """Puts this process's rows of a batch on its devices, as part of the global batch that `like` describes.

    Args:
      batch: whole rows, those of `parallel.rules.process_rows`; of each the devices get the tokens that they hold.
      like: shapes, types and shardings of the global batch.
    """
    placed = {}
    for name, array in batch.items():
        sharding, shape = like[name].sharding, like[name].shape
        start, stop = process_columns(sharding, shape[1])
        placed[name] = jax.make_array_from_process_local_data(sharding, array[:, start:stop], shape)
    return placed


def make_eval_step(loss: Loss) -> Callable[[Any, Batch], Metrics]:
    """Returns `step(params, batch) -> sums` over the batch's tokens: the reported losses and their weight."""

    def step(params: Any, batch: Batch) -> Metrics:
        _, sums = loss(params, batch, None)
        return {**sums, "weight": jnp.sum(batch["weights"])}

    return step

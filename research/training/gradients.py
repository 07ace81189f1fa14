"""A loss, and its gradients as means over a batch that is taken in microbatches."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.data.batch import Batch
from research.models.layer_loops import LayerLoop
from research.models.reports import ExpertCounts
from research.models.transformer import Output
from research.training.layout import constrain_tree

Metrics = dict[str, Float[Array, ""]]


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


@runtime_checkable
class LayeredLoss(Loss, Protocol):
    """The loss of a model whose layers can be run by another strategy."""

    def with_loop(self, loop: LayerLoop) -> "LayeredLoss":
        """Returns the same loss of the model with its layers run by `loop`."""

    def hidden(self, trainable: Any, frozen: Any, batch: Batch, key: jax.Array | None) -> Output:
        """Returns the model's output, which the loss is taken of; arguments as of `sums`."""


def microbatch_of(batch: Batch, index: int | Int[Array, ""], count: int) -> Batch:
    """Returns every `count`-th row of a batch, from row `index` on.

    A device's rows are consecutive, so each microbatch has equally many of them from each device.
    """
    rows = {}
    for name, array in batch.items():
        # [B, T] -> [B / count, count, T] -> [B / count, T]
        groups = array.reshape(-1, count, *array.shape[1:])
        rows[name] = groups[:, index]
    return rows


def mean_gradients(
    loss: Loss,
    trainable: Any,
    frozen: Any,
    batch: Batch,
    weight: Float[Array, ""],
    key: jax.Array,
    *,
    accumulation: int = 1,
    unroll: bool = False,
    shardings: Any = None,
) -> tuple[Float[Array, ""], Report, Any]:
    """Returns what is minimized, the report and the gradients: means over the whole batch.

    The report's experts are counts, no means. Gradients, and their sum over microbatches, are laid
    out by `shardings`.
    """

    def mean_loss(trainable: Any, micro: Batch, key: jax.Array) -> tuple[Float[Array, ""], Report]:
        result = loss.sums(trainable, frozen, micro, key)
        return minimized_mean(*result, weight, accumulation)

    value_and_grad = jax.value_and_grad(mean_loss, has_aux=True)

    def gradient(trainable: Any, micro: Batch, key: jax.Array) -> tuple[Any, Any]:
        result, grads = value_and_grad(trainable, micro, key)
        return result, constrain_tree(grads, shardings)

    if accumulation == 1:
        (value, report), grads = gradient(trainable, batch, key)
        return value, report, grads

    # One microbatch of the scan: all that it returns is summed, the gradients too.
    def add(total: Any, index: Array) -> tuple[Any, None]:
        micro = microbatch_of(batch, index, accumulation)
        # Each microbatch has its own dropout.
        micro_key = jax.random.fold_in(key, index)
        result = gradient(trainable, micro, micro_key)
        total = jax.tree.map(jnp.add, total, result)
        return total, None

    # Traced, not computed: only the shapes of ((value, report), gradients) are needed.
    first = microbatch_of(batch, 0, accumulation)
    shapes = jax.eval_shape(gradient, trainable, first, key)
    result, sums = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
    zeros = (result, constrain_tree(sums, shardings))

    indices = jnp.arange(accumulation)
    total, _ = jax.lax.scan(add, zeros, indices, unroll=unroll)
    (value, report), grads = total
    return value, report, grads


def minimized_mean(
    total: Float[Array, ""], report: Report, weight: Float[Array, ""], accumulation: int
) -> tuple[Float[Array, ""], Report]:
    """Returns what is minimized of a microbatch, and its report.

    Their sums over the microbatches of a batch are the means over the batch.

    Args:
      total, report: of `Loss.sums`.
      weight: of the whole batch.
      accumulation: microbatches of a batch.
    """
    # A batch of padding alone has weight 0, and a loss of 0 and not of 0 / 0.
    weight = jnp.where(weight > 0, weight, 1.0)
    means = _divided(report.means, accumulation)
    sums = _divided(report.sums, weight)
    minimized = sum(means.values(), start=total / weight)
    return minimized, Report(sums, means, report.experts)


def _divided(values: Metrics, divisor: int | Float[Array, ""]) -> Metrics:
    return {name: value / divisor for name, value in values.items()}

"""Held-out loss: sums over batches, divided once at the end."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from research.data.batch import Batch
from research.training.gradients import Metrics


def evaluate(
    step: Callable[[Any, Any, Batch], Metrics],
    trainable: Any,
    frozen: Any,
    batches: Iterable[Batch],
    bytes_per_target: float | None,
) -> dict[str, float]:
    """Returns the mean loss in nats per predicted token, and in bits per byte of text.

        bits per byte = loss / (ln 2 · bytes per token)

    Args:
      step: from `make_eval_step`.
      trainable: the trained parameters, or their average.
      frozen: the other parameters.
      batches: on the devices.
      bytes_per_target: UTF-8 bytes of held-out text for each predicted token; None where not all of
          the text is predicted, so that bits per byte mean nothing.
    """
    # Float64 on the host: float32 would lose digits over many batches.
    loss_sum = np.float64(0)
    weight = np.float64(0)
    for batch in batches:
        sums = jax.device_get(step(trainable, frozen, batch))
        loss_sum += np.float64(sums["loss"])
        weight += np.float64(sums["weight"])

    # Without a token to predict the loss is 0.
    loss = float(loss_sum / (weight or 1.0))
    row = {"eval/loss": loss}
    if bytes_per_target is not None:
        row["eval/bits_per_byte"] = loss / (math.log(2) * bytes_per_target)
    return row

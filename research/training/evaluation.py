"""Held-out loss: sums over batches, one division at the end."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from research.data.batch import Batch
from research.training.step import Metrics


def evaluate(
    step: Callable[[Any, Any, Batch], Metrics],
    trainable: Any,
    frozen: Any,
    batches: Iterable[Batch],
    bytes_per_target: float | None,
) -> dict[str, float]:
    """Returns the mean loss in nats a token that is predicted, and in bits a byte of text where
    that means something.

    bits per byte = loss / (ln 2 · bytes per token)

    Args:
      step: from `make_eval_step`.
      trainable: the trained parameters, or their average.
      frozen: the other parameters.
      batches: on the devices.
      bytes_per_target: UTF-8 bytes of held-out text for each token that is predicted; None: not all
          of the text is.
    """
    sums: dict[str, np.float64] = {"loss": np.float64(0), "weight": np.float64(0)}
    for batch in batches:
        values = jax.device_get(step(trainable, frozen, batch))
        sums = {name: total + np.float64(values[name]) for name, total in sums.items()}
    loss = float(sums["loss"] / (sums["weight"] or 1.0))
    if bytes_per_target is None:
        return {"eval/loss": loss}
    return {"eval/loss": loss, "eval/bits_per_byte": loss / (math.log(2) * bytes_per_target)}

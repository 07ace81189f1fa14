"""The mean loss since the last row of the metrics: one step's loss is noisy."""

import dataclasses
import math


@dataclasses.dataclass
class LossMean:
    """Adds up the losses of steps, each by the weight that the step divided its own loss by.

        mean = Σ_s w_s loss_s / Σ_s w_s

    So for a loss in nats per token it is the mean over all tokens of these steps. A skipped step is
    left out: it changed nothing, and its loss may not be finite.

    Attributes:
      weighted_sum: Σ w loss, in the float64 of Python.
      weight: Σ w.
      steps: how many were added, those without a weight included.
    """

    weighted_sum: float = 0.0
    weight: float = 0.0
    steps: int = 0

    def add(self, loss: float, weight: float) -> None:
        """Adds a step that was not skipped."""
        self.weighted_sum += weight * loss
        self.weight += weight
        self.steps += 1

    def value(self) -> float:
        """Returns the mean; NaN of no step, and 0 where no step had a weight."""
        if not self.steps:
            return math.nan
        # Weights are not below 0: where all are 0, so is the weighted sum.
        return self.weighted_sum / (self.weight or 1.0)

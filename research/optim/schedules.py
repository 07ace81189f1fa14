"""Learning-rate schedules: a warm-up, then one of five decays."""

import dataclasses
from typing import Literal

import jax.numpy as jnp
import optax

from research.core.errors import UserError
from research.core.promotion import promoting


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """The shape of the learning rate over a run.

    Attributes:
      name: `constant`, `cosine`, `linear`, `inverse_sqrt`, or `wsd` (warm-up, stable, decay).
      warmup_steps: steps of linear rise from 0 to the peak.
      decay_steps: for `wsd`: the last steps, of linear decay; otherwise decay begins where the
          warm-up ends.
      final_fraction: the rate that the run ends at, after its last step, as a fraction of the peak;
        `inverse_sqrt` and `constant` ignore it.
    """

    name: Literal["constant", "cosine", "linear", "inverse_sqrt", "wsd"] = "cosine"
    warmup_steps: int = 0
    decay_steps: int = 0
    final_fraction: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup_steps < 0 or self.decay_steps < 0:
            raise UserError(
                "warmup_steps",
                self.warmup_steps,
                f"and decay_steps = {self.decay_steps} must be ≥ 0.",
            )
        if not 0 <= self.final_fraction <= 1:
            raise UserError("final_fraction", self.final_fraction, "must lie in [0, 1].")
        if self.name == "wsd" and self.decay_steps == 0:
            raise UserError("decay_steps", 0, "must be at least 1 for name = 'wsd'.")


def build_schedule(config: ScheduleConfig, peak: float, total_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step, from 0.

    Args:
      config: its shape.
      peak: the largest rate.
      total_steps: of the run.

    Raises:
      UserError: the parts are longer than the run.

    Source: cosine: Loshchilov & Hutter 2016, arXiv:1608.03983, equation 5; inverse square root:
    Vaswani et al. 2017, arXiv:1706.03762, section 5.3; warm-up–stable–decay: Hu et al. 2024,
    arXiv:2404.06395, section 4.
    """
    warmup = config.warmup_steps
    floor = peak * config.final_fraction
    decay = config.decay_steps if config.name == "wsd" else 0
    if warmup + decay > total_steps:
        raise UserError(
            "optim.schedule",
            constraint=f": warm-up and decay take {warmup + decay} steps, but train.steps = "
            f"{total_steps}.",
        )
    left = max(total_steps - warmup, 1)
    if config.name == "constant":
        after = optax.constant_schedule(peak)
    elif config.name == "cosine":
        after = promoting(optax.cosine_decay_schedule(peak, left, alpha=config.final_fraction))
    elif config.name == "linear":
        after = optax.linear_schedule(peak, floor, left)
    elif config.name == "inverse_sqrt":
        start = max(warmup, 1)

        def after(step):
            # Joined schedules are called with steps before their own beginning, too.
            steps_since = jnp.maximum(step, 0)
            fraction = start / (start + steps_since)
            return peak * jnp.sqrt(fraction)
    else:
        # 100 steps with 10 of warm-up and 20 of decay: 70 stable ones between them.
        stable = left - config.decay_steps
        level = optax.constant_schedule(peak)
        falling = optax.linear_schedule(peak, floor, config.decay_steps)
        after = optax.join_schedules([level, falling], [stable])

    if warmup == 0:
        return after
    rising = optax.linear_schedule(0.0, peak, warmup)
    return optax.join_schedules([rising, after], [warmup])

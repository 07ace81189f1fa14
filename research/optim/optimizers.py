"""Optimizers by name. Whether an array is a matrix or a bias is read from its box, never from its
path or shape.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from research.core.errors import UserError
from research.core.promotion import promoting
from research.optim.layer_by_layer import layer_by_layer
from research.optim.muon import muon
from research.optim.schedules import ScheduleConfig, build_schedule


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate.

    Attributes:
      name: `adamw`, `adafactor`, `lion`, `sgd` (momentum `beta1`) or `muon`
        (matrices with momentum `beta1`; the rest by AdamW with Nesterov momentum).
      learning_rate: the peak.
      schedule: warm-up and decay.
      weight_decay: decoupled, times the learning rate, on matrices only (embeddings included,
          biases never).
      beta1: decay of the first moment (or momentum); Adafactor has none.
      beta2: decay of the second moment of AdamW, Lion and Muon's rest; Adafactor has its own
          schedule.
      epsilon: added to the root of the second moment, of AdamW and Muon.
      clip_norm: gradients of a larger global norm are scaled down to it; None leaves them.
      ema_decay: of the averaged parameters that evaluation reads; None keeps no average. It needs
          float32 parameters.
    """

    name: Literal["adamw", "adafactor", "lion", "sgd", "muon"] = "adamw"
    learning_rate: float = 3e-4
    schedule: ScheduleConfig = ScheduleConfig()
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float | None = 1.0
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise UserError("learning_rate", self.learning_rate, "must be above 0.")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(name, value, "must lie in [0, 1).")
        for name in ("weight_decay", "epsilon"):
            value = getattr(self, name)
            if value < 0:
                raise UserError(name, value, "must not be below 0.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError("clip_norm", self.clip_norm, "must be above 0, or None.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError("ema_decay", self.ema_decay, "must lie in (0, 1), or None.")


def build_optimizer(
    config: OptimConfig, axes: Any, total_steps: int
) -> tuple[optax.GradientTransformation, Callable[[Any], Float[Array, ""]]]:
    """Returns the optimizer, and a function from its state to the learning rate of its next update.

    Clipping is not in it: the training step knows the gradient's norm already.

    Args:
      config: its values.
      axes: tree of the parameters' `parallel.parameter.Axes`.
      total_steps: of the run.

    Raises:
      UserError: a schedule that is longer than the run.

    Source: AdamW: Loshchilov & Hutter 2017, arXiv:1711.05101; Adafactor: Shazeer & Stern 2018,
    arXiv:1804.04235; Lion: Chen et al. 2023, arXiv:2302.06675; Muon: Jordan et al. 2024, with the
    update scaled to AdamW's size as in Liu et al. 2025, arXiv:2502.16982, section 2.2.
    """
    schedule = build_schedule(config.schedule, config.learning_rate, total_steps)

    def learning_rate(state: Any) -> Float[Array, ""]:
        step = _update_count(state)
        rate = schedule(step)
        return jnp.asarray(rate, jnp.float32)

    optimizer = _build(config, axes, schedule)
    # Optax mixes types, which JAX raises for under pytest.
    update = promoting(optimizer.update)
    optimizer = optax.GradientTransformation(optimizer.init, update)
    return optimizer, learning_rate


def _update_count(state: Any) -> Int[Array, ""]:
    """Returns the updates that an optimizer has made, as the part of it that follows the schedule
    counts them.
    """

    def scheduled(node: Any) -> bool:
        return isinstance(node, optax.ScaleByScheduleState)

    nodes = jax.tree.leaves(state, is_leaf=scheduled)
    (counter,) = [node for node in nodes if scheduled(node)]
    return counter.count


def _build(config: OptimConfig, axes: Any, rate: optax.Schedule) -> optax.GradientTransformation:
    matrices = jax.tree.map(lambda axes: axes.is_matrix, axes)
    decay = {"weight_decay": config.weight_decay, "mask": matrices}
    if config.name == "adamw":
        return optax.adamw(rate, b1=config.beta1, b2=config.beta2, eps=config.epsilon, **decay)
    if config.name == "lion":
        return optax.lion(rate, b1=config.beta1, b2=config.beta2, **decay)
    if config.name == "sgd":
        direction = optax.chain(optax.trace(config.beta1), optax.scale(-1.0))
    elif config.name == "adafactor":
        factored = optax.adafactor(learning_rate=None, multiply_by_parameter_scale=False)
        direction = layer_by_layer(factored, axes)
    else:
        direction = muon(
            axes, beta=config.beta1, adam_beta2=config.beta2, epsilon=config.epsilon, rms=0.2
        )

    # These directions are negated already, at rate 1 and without weight decay.
    return optax.chain(
        direction,
        optax.add_decayed_weights(-config.weight_decay, matrices),
        optax.scale_by_learning_rate(rate, flip_sign=False),
    )

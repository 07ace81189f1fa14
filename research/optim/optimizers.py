"""Optimizers by name. What is a matrix is told by logical axes, never by a parameter's path."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float
from optax import contrib

from research.core.errors import UserError
from research.optim.schedules import ScheduleConfig, build_schedule

Names = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its learning rate.

    Attributes:
      name: `adamw`, `adafactor`, `lion`, `sgd` (momentum `beta1`) or `muon`
        (matrices with momentum `beta1`; the rest by AdamW with Nesterov momentum).
      learning_rate: the peak.
      schedule: its course.
      weight_decay: decoupled, times the learning rate, on matrices only (embeddings included).
      beta1: decay of the first moment (or momentum); Adafactor has none.
      beta2: decay of the second moment of AdamW, Lion and Muon's rest; Adafactor has its own course.
      epsilon: added to the root of the second moment, of AdamW and Muon.
      clip_norm: gradients of a larger global norm are scaled down to it; None leaves them.
      ema_decay: of the averaged parameters that evaluation reads; None keeps no average.
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
            raise UserError(f"learning_rate = {self.learning_rate} must be above 0.")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)} must lie in [0, 1).")
        for name in ("weight_decay", "epsilon"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} = {getattr(self, name)} must not be below 0.")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError(f"clip_norm = {self.clip_norm} must be above 0, or None.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise UserError(f"ema_decay = {self.ema_decay} must lie in (0, 1), or None.")


def is_matrix(names: Names) -> bool:
    """Whether an array with these logical axes maps vectors to vectors: the model width and one more axis."""
    return "embed" in names and len([name for name in names if name != "layers"]) > 1


def is_table(names: Names) -> bool:
    """Whether an array's rows (or columns) stand for ids: embeddings and the output projection."""
    return "vocab" in names or "positions" in names


def is_selection(names: Names) -> bool:
    """Whether an array steers the choice of experts: its gradient is no slope of the loss, but a load over the mean."""
    return "selection" in names


def gradient_norm(gradients: Any, axes: Any) -> Float[Array, ""]:
    """Returns the norm of all gradients together; loads are none."""
    loads = _map_names(is_selection, axes)
    slopes = jax.tree.map(lambda load, g: None if load else g, loads, gradients)
    return optax.global_norm(slopes)


def build_optimizer(
    config: OptimConfig, axes: Any, total_steps: int, bias_speed: float = 0.0
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer, and its schedule for the log.

    Clipping is not in it: the training step knows the gradient's norm already.

    Args:
      config: its values.
      axes: tree of logical axis names of the parameters.
      total_steps: of the run.
      bias_speed: how far a step moves the biases of the choice of experts, whatever the optimizer and its rate.

    Raises:
      UserError: a schedule that is longer than the run.

    Source: AdamW: Loshchilov & Hutter 2017, arXiv:1711.05101; Adafactor: Shazeer & Stern 2018, arXiv:1804.04235; Lion:
    Chen et al. 2023, arXiv:2302.06675; Muon: Jordan et al. 2024, with the update scaled to AdamW's size as in Liu et
    al. 2025, arXiv:2502.16982, section 2.2.
    """
    rate = build_schedule(config.schedule, config.learning_rate, total_steps)
    return _steering(_descending(config, axes, rate), axes, bias_speed), rate


def _steering(inner: optax.GradientTransformation, axes: Any, speed: float) -> optax.GradientTransformation:
    """Lets biases of the choice of experts rise by `speed` below the mean load and fall above it.

    The rest is left to `inner`, whose state is the only one; to it these biases have no gradient.

    Source: Wang et al. 2024, arXiv:2408.15664, algorithm 1; DeepSeek-AI 2024, arXiv:2412.19437, section 2.1.2.
    """
    if not speed:
        return inner
    loads = _map_names(is_selection, axes)

    def update(gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
        slopes = jax.tree.map(lambda load, g: jnp.zeros_like(g) if load else g, loads, gradients)
        updates, state = inner.update(slopes, state, params)
        return jax.tree.map(lambda load, g, u: -speed * jnp.sign(g) if load else u, loads, gradients, updates), state

    return optax.GradientTransformation(inner.init, update)


def _descending(config: OptimConfig, axes: Any, rate: optax.Schedule) -> optax.GradientTransformation:
    matrices = _map_names(is_matrix, axes)
    decay = {"weight_decay": config.weight_decay, "mask": matrices}
    if config.name == "adamw":
        return optax.adamw(rate, b1=config.beta1, b2=config.beta2, eps=config.epsilon, **decay)
    if config.name == "lion":
        return optax.lion(rate, b1=config.beta1, b2=config.beta2, **decay)
    if config.name == "sgd":
        direction = optax.chain(optax.trace(config.beta1), optax.scale(-1.0))
    elif config.name == "adafactor":
        direction = _layer_by_layer(optax.adafactor(learning_rate=None, multiply_by_parameter_scale=False), axes)
    else:
        direction = contrib.muon(
            1.0,
            beta=config.beta1,
            eps=config.epsilon,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=_map_names(_muon_axes, axes),
            consistent_rms=0.2,
        )
    # What these give points downhill already, at rate 1 and without decay.
    return optax.chain(
        direction,
        optax.add_decayed_weights(-config.weight_decay, matrices),
        optax.scale_by_learning_rate(rate, flip_sign=False),
    )


def _map_names(function: Any, axes: Any) -> Any:
    return jax.tree.map(function, axes, is_leaf=lambda names: isinstance(names, tuple))


def _layer_by_layer(inner: optax.GradientTransformation, axes: Any) -> optax.GradientTransformation:
    """Lets a transformation that looks at whole arrays see one layer at a time where layers are stacked.

    So a scanned model takes the steps of an unrolled one, and their states are the same on disk.
    """
    batched = _map_names(lambda names: 0 if "layers" in names else None, axes)
    stacked = [
        path for path, axis in jax.tree_util.tree_leaves_with_path(batched, is_leaf=lambda x: x is None) if axis == 0
    ]
    if not stacked:
        return inner

    def state_axes(params: Any) -> Any:
        """Returns 0 for each array of the state that stands for a stacked parameter: its path ends in that one's."""
        one = jax.tree.map(lambda axis, p: p if axis is None else p[0], batched, params, is_leaf=lambda x: x is None)
        return jax.tree_util.tree_map_with_path(
            lambda path, _: 0 if any(path[-len(end) :] == end for end in stacked) else None,
            jax.eval_shape(inner.init, one),
        )

    def init(params: Any) -> Any:
        return jax.vmap(inner.init, in_axes=(batched,), out_axes=state_axes(params))(params)

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        laid = state_axes(params)
        return jax.vmap(inner.update, in_axes=(batched, laid, batched), out_axes=(batched, laid))(
            updates, state, params
        )

    return optax.GradientTransformation(init, update)


def _muon_axes(names: Names) -> contrib.MuonDimensionNumbers | None:
    """Returns which axes of a matrix are inputs and which outputs: the model width alone is one side of it."""
    if not is_matrix(names) or is_table(names):
        return None
    width = names.index("embed")
    others = tuple(i for i, name in enumerate(names) if name not in ("embed", "layers"))
    return (
        contrib.MuonDimensionNumbers((width,), others)
        if width < others[0]
        else contrib.MuonDimensionNumbers(others, (width,))
    )

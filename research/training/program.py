"""A training run as programs for a mesh: what its state is, how it begins, its steps, compiled."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from research.core.random import key_for
from research.data.batch import Batch
from research.data.objectives import CAUSAL, ObjectiveConfig, batch_shapes
from research.models.config import ModelConfig
from research.models.language_model import language_model
from research.optim.optimizers import OptimConfig, build_optimizer, gradient_norm
from research.parallel.mesh import MeshConfig, make_mesh
from research.parallel.rules import batch_sharding, check_batch, logical_axes
from research.parallel.target import compiling_for_mesh, mesh_platform
from research.training.config import TrainConfig
from research.training.state import TrainState, abstract_state, create_state
from research.training.step import (
    AbstractBatch,
    Metrics,
    Step,
    language_model_loss,
    make_eval_step,
    make_train_step,
)


@dataclasses.dataclass(frozen=True)
class Program:
    """The pure functions of a run, and where their arguments lie.

    Attributes:
      mesh: the devices.
      state: shapes, types and shardings of the training state.
      batch: the same of a batch.
      create: makes the state of step 0 from a key.
      train_step: one step.
      eval_step: sums over a held-out batch, from parameters.
    """

    mesh: jax.sharding.Mesh
    state: TrainState
    batch: AbstractBatch
    create: Callable[[jax.Array], TrainState]
    train_step: Step
    eval_step: Callable[[Any, Batch], Metrics]

    def compile_train_step(self) -> Step:
        """Returns the step compiled; the new state lies as the old one, whose buffers it takes."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.state)
        step = jax.jit(self.train_step, donate_argnums=0, out_shardings=(shardings, None))
        with jax.set_mesh(self.mesh):
            return step.lower(self.state, self.batch).compile()

    def compile_eval_step(self) -> Callable[[Any, Batch], Metrics]:
        """Returns the evaluation compiled."""
        with jax.set_mesh(self.mesh):
            return jax.jit(self.eval_step).lower(self.state.eval_params(), self.batch).compile()


def build_program(
    model: ModelConfig,
    optim: OptimConfig,
    train: TrainConfig,
    mesh: MeshConfig,
    devices: Sequence[jax.Device] | None = None,
    objective: ObjectiveConfig = CAUSAL,
) -> Program:
    """Returns the run's functions on `devices` (all by default); nothing is compiled and no array is made.

    Raises:
      UserError: sizes that do not fit the devices, or a schedule longer than the run.
    """
    place = make_mesh(mesh, devices)
    check_batch(train.batch_size, train.accumulation, place)
    untargeted = language_model(model, mesh_platform(place)).init

    def init(key: jax.Array) -> Any:
        with compiling_for_mesh(place):
            return untargeted(key)

    axes = logical_axes(jax.eval_shape(init, jax.random.key(0)))
    bias_speed = 0.0 if model.experts is None else model.experts.bias_speed
    optimizer, schedule = build_optimizer(optim, axes, train.steps, bias_speed)
    state = abstract_state(init, optimizer, place, keep_ema=optim.ema_decay is not None)
    loss = language_model_loss(model, train.z_loss, train.label_smoothing)
    train_step = make_train_step(
        loss,
        optimizer,
        schedule,
        key_for(train.seed, "dropout"),
        norm_of=functools.partial(gradient_norm, axes=axes),
        clip_norm=optim.clip_norm,
        ema_decay=optim.ema_decay,
        accumulation=train.accumulation,
    )
    return Program(
        mesh=place,
        state=state,
        batch=abstract_batch(objective, train.batch_size, train.sequence_length, batch_sharding(place)),
        create=functools.partial(create_state, init, optimizer, state),
        train_step=train_step,
        eval_step=make_eval_step(language_model_loss(model)),
    )


def abstract_batch(
    objective: ObjectiveConfig, batch_size: int, sequence_length: int, sharding: jax.sharding.Sharding
) -> AbstractBatch:
    """Returns shapes, types and sharding of a batch."""
    shapes = batch_shapes(objective, batch_size, sequence_length)
    return {name: jax.ShapeDtypeStruct(*shape, sharding=sharding) for name, shape in shapes.items()}

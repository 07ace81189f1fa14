"""A training run as programs for a mesh: its abstract state, its initial state, its steps."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from research.core.random import key_for
from research.data.batch import Batch
from research.optim.optimizers import OptimConfig, build_optimizer
from research.parallel.divisibility import check_batch
from research.parallel.mesh import make_mesh
from research.parallel.mesh_axes import PIPELINE_AXIS
from research.parallel.mesh_config import MeshConfig
from research.parallel.parameter import logical_axes
from research.parallel.target import mesh_platform
from research.training.abstract import (
    abstract_batch,
    abstract_params,
    abstract_saved,
    shardings_of,
)
from research.training.config import TrainConfig
from research.training.gradients import mean_gradients
from research.training.layout import Layout, zero_layout
from research.training.partition import EVERYTHING, Partition
from research.training.pipelined import build_pipelined, on_stages
from research.training.state import TrainState, abstract_state, create_state
from research.training.step import (
    AbstractBatch,
    Loss,
    MeanGradients,
    Metrics,
    Step,
    make_eval_step,
    make_train_step,
)

Init = Callable[[jax.Array], Any]


@dataclasses.dataclass(frozen=True)
class Program:
    """The pure functions of a run, and the shardings of their arguments.

    Attributes:
      mesh: the devices.
      init: makes all boxed parameters from a key.
      partition: which of them are trained.
      state: shapes, types and shardings of the training state, whose parameters are the trainable
          ones.
      frozen: the same of the frozen parameters; empty where everything is trained.
      saved: the same of the state with all parameters, as a checkpoint has it.
      batch: the same of a batch.
      create: makes the state of step 0 from a key.
      train_step: one step.
      eval_step: sums over a held-out batch, from trainable and frozen parameters.
      compiler_options: of the training step, by name.
    """

    mesh: Mesh
    init: Init
    partition: Partition
    state: TrainState
    frozen: Any
    saved: TrainState
    batch: AbstractBatch
    create: Callable[[jax.Array], TrainState]
    train_step: Step
    eval_step: Callable[[Any, Any, Batch], Metrics]
    compiler_options: Mapping[str, str | bool]

    def lower_train_step(self) -> jax.stages.Lowered:
        """Returns the step as a program for XLA; the new state takes the buffers of the old one."""
        # The new state is sharded as the old one, so that it can be the next step's argument; for
        # the metrics, which are single numbers, XLA chooses.
        out_shardings = (shardings_of(self.state), None)
        step = jax.jit(self.train_step, donate_argnums=0, out_shardings=out_shardings)
        with jax.set_mesh(self.mesh):
            return step.lower(self.state, self.frozen, self.batch)

    def compile_train_step(self) -> Step:
        """Returns the step compiled."""
        return self.lower_train_step().compile(self.compiler_options)

    def compile_eval_step(self) -> Callable[[Any, Any, Batch], Metrics]:
        """Returns the evaluation compiled."""
        step = jax.jit(self.eval_step)
        with jax.set_mesh(self.mesh):
            return step.lower(self.state.eval_params(), self.frozen, self.batch).compile()

    def resume_or_create(self, saved: TrainState | None, key: jax.Array) -> tuple[TrainState, Any]:
        """Returns the state and the frozen parameters of a checkpoint, or new ones from a key."""
        if saved is not None:
            return self.split(saved)
        return self.create(key), self.create_frozen(key)

    def create_frozen(self, key: jax.Array) -> Any:
        """Returns the frozen parameters of step 0, made from the key that makes the state."""
        if self.partition is EVERYTHING:
            return {}

        # XLA drops what is not returned: the trainable parameters are not made a second time.
        def make(key: jax.Array) -> Any:
            _, frozen = self.partition.split(self.init(key))
            return nn.unbox(frozen)

        return jax.jit(make, out_shardings=shardings_of(self.frozen))(key)

    def merge(self, state: TrainState, frozen: Any) -> TrainState:
        """Returns the state with all parameters in their own types, as a checkpoint has it.

        Arrays that need no change are not copied.
        """

        if self.partition is EVERYTHING:
            return state
        saved = self.saved

        # Frozen parameters may be kept in bfloat16 that the model and its checkpoints have in
        # float32.
        def complete(trainable: Any) -> Any:
            params = self.partition.merge(trainable, frozen)
            return jax.tree.map(lambda leaf, to: _as_type(leaf, to.dtype), params, saved.params)

        params = complete(state.params)
        ema = None
        if state.ema is not None:
            ema = complete(state.ema)
        return state.replace(params=params, ema=ema)

    def split(self, saved: TrainState) -> tuple[TrainState, Any]:
        """Returns the state and the frozen parameters that a checkpoint holds together."""
        if self.partition is EVERYTHING:
            return saved, {}
        trainable, frozen = self.partition.split(saved.params)
        # The average of a frozen parameter is the parameter itself.
        ema = None
        if saved.ema is not None:
            ema, _ = self.partition.split(saved.ema)
        state = saved.replace(params=trainable, ema=ema)
        return jax.device_put((state, frozen), shardings_of((self.state, self.frozen)))


def build_program(
    init: Init,
    loss: Loss,
    batch_shapes: Mapping[str, tuple[tuple[int, ...], str]],
    optim: OptimConfig,
    train: TrainConfig,
    mesh: MeshConfig,
    devices: Sequence[jax.Device] | None = None,
    *,
    eval_loss: Loss | None = None,
    partition: Partition = EVERYTHING,
    expert_bias_speed: float = 0.0,
) -> Program:
    """Returns the functions of a run; nothing is compiled, and no array is created.

    Args:
      init, loss: makes boxed parameters from a key; what is minimized.
      batch_shapes: (shape, dtype) of every array of a batch.
      optim, train, mesh, devices: the optimizer, the steps, the mesh, its devices (None is all).
      eval_loss: what is evaluated; None: the same loss.
      partition, expert_bias_speed: as of `make_train_step`.

    Raises:
      UserError: sizes that do not fit the devices, or a schedule longer than the run.
    """
    devices_mesh = make_mesh(mesh, devices)
    check_batch(train.batch_size, train.sequence_length, train.accumulation, devices_mesh)
    boxed = jax.eval_shape(init, jax.random.key(0))
    trainable, frozen = jax.eval_shape(partition.split, boxed)
    optimizer, learning_rate = build_optimizer(optim, logical_axes(trainable), train.steps)
    keep_ema = optim.ema_decay is not None
    state = abstract_state(trainable, optimizer, devices_mesh, keep_ema=keep_ema, zero=mesh.zero)

    layout = zero_layout(trainable, devices_mesh, mesh.zero)
    train_step = make_train_step(
        loss,
        _gradients_of(loss, train, devices_mesh, trainable, partition, layout),
        optimizer,
        learning_rate,
        key_for(train.seed, "dropout"),
        partition=partition,
        expert_bias_speed=expert_bias_speed,
        clip_norm=optim.clip_norm,
        ema_decay=optim.ema_decay,
        layout=layout,
    )
    init_trainable = functools.partial(_init_trainable, init, partition)
    return Program(
        mesh=devices_mesh,
        init=init,
        partition=partition,
        state=state,
        frozen=abstract_params(frozen, devices_mesh, shard_width=mesh.zero == 3),
        saved=abstract_saved(boxed, state, devices_mesh, mesh.zero),
        batch=abstract_batch(batch_shapes, devices_mesh),
        create=functools.partial(create_state, init_trainable, optimizer, state),
        train_step=train_step,
        eval_step=make_eval_step(on_stages(eval_loss or loss, train, devices_mesh)),
        compiler_options=mesh.xla_options(mesh_platform(devices_mesh)),
    )


def _gradients_of(
    loss: Loss,
    train: TrainConfig,
    mesh: Mesh,
    trainable: Any,
    partition: Partition,
    layout: Layout,
) -> MeanGradients:
    """Returns what takes the gradients of a batch: through a pipeline where the mesh has one, else
    of one microbatch after the other.
    """
    if mesh.shape[PIPELINE_AXIS] > 1:
        return build_pipelined(loss, train, mesh, trainable, partition, layout)
    # The body of a loop is slow on XLA for CPU.
    unroll = mesh_platform(mesh) == "cpu"
    return functools.partial(
        mean_gradients,
        loss,
        accumulation=train.accumulation,
        unroll=unroll,
        shardings=layout.gradients,
    )


def _init_trainable(init: Init, partition: Partition, key: jax.Array) -> Any:
    trainable, _ = partition.split(init(key))
    return trainable


def _as_type(array: Any, dtype: Any) -> Any:
    """Returns an array in a type; it is not copied where it has that type."""
    return array if array.dtype == dtype else array.astype(dtype)

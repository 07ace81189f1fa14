"""Gradients of a batch through a pipeline: the loss of a model is cut into parts at its layers.

The parts are the loss itself, run with other strategies for its layers: one that notes what goes
into them, and one that gives what came out of them. So whatever a model computes before and after
its layers, in heads and in losses, is computed here too. What a part does not need is not compiled.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from research.core.errors import UserError
from research.data.batch import Batch
from research.models.cache import LayerCache
from research.models.context import Context
from research.models.layer_loops import Hidden, LayerGroup, LayersOutput, Scanned
from research.models.layer_places import layers_in_places
from research.models.reports import LayerReport
from research.parallel.mesh_axes import PIPELINE_AXIS
from research.parallel.pipeline import StagedModel, run_pipeline
from research.parallel.pipeline_schedule import PipelineSchedule, make_schedule
from research.parallel.stages import LayerRange, StageSplit, without_stages
from research.training.config import TrainConfig
from research.training.gradients import (
    LayeredLoss,
    Loss,
    Report,
    mean_gradients,
    microbatch_of,
    minimized_mean,
)
from research.training.layout import Layout, constrain_tree
from research.training.partition import EVERYTHING, Partition
from research.training.staged_loop import StagedLoop
from research.training.step import MeanGradients

# The name of stacked layers among parameters and reports.
LAYERS = "layers"


class _Entered(NamedTuple):
    """What goes into the layers of a model."""

    group: LayerGroup
    x: Hidden
    context: Context


@dataclasses.dataclass(frozen=True, eq=False)
class _NoteInput:
    """Runs no layers, and keeps what went into them."""

    found: list[_Entered]

    def run(
        self, group: LayerGroup, x: Hidden, caches: tuple[LayerCache, ...] | None, context: Context
    ) -> LayersOutput:
        """Implements `LayerLoop.run`."""
        self.found.append(_Entered(group, x, context))
        return x, None, {}


@dataclasses.dataclass(frozen=True, eq=False)
class _GiveOutput:
    """Runs no layers, and gives what they did elsewhere."""

    x: Hidden
    report: LayerReport

    def run(
        self, group: LayerGroup, x: Hidden, caches: tuple[LayerCache, ...] | None, context: Context
    ) -> LayersOutput:
        """Implements `LayerLoop.run`."""
        return self.x, None, {LAYERS: self.report}


class _Micro(NamedTuple):
    """The inputs of a microbatch.

    Attributes:
      batch: its rows.
      weight: of the whole batch.
      key: of its dropout.
      frozen: parameters that are only read.
    """

    batch: Any
    weight: Float[Array, ""]
    key: jax.Array
    frozen: Any


@dataclasses.dataclass(frozen=True)
class PipelinedLoss:
    """A loss whose layers are cut into the stages of a pipeline.

    Attributes:
      loss: of a model with stacked layers.
      schedule: of its microbatches.
      shardings: of the gradients.
      free: those of the layers' that leave them together.
    """

    loss: LayeredLoss
    schedule: PipelineSchedule
    shardings: Any
    free: Any

    def __call__(
        self,
        trainable: Any,
        frozen: Any,
        batch: Batch,
        weight: Float[Array, ""],
        key: jax.Array,
    ) -> tuple[Float[Array, ""], Report, Any]:
        """Implements `step.MeanGradients`."""
        outer = {name: tree for name, tree in trainable.items() if name != LAYERS}
        layers = trainable[LAYERS]
        inputs = _Micro(batch, weight, key, frozen)
        stages = _Stages(self.loss, self.schedule, _report_shape(self, outer, layers, inputs))
        split, hidden_axes = stages.split(outer, layers, inputs)
        zero = stages.zero_report()

        # What the loss makes of the layers' reports is linear in them. So their gradient is the
        # same everywhere, and what they add is the derivative along them.
        def reported(report: LayerReport) -> tuple[Float[Array, ""], Report]:
            micro = stages.microbatch(inputs, jnp.zeros((), jnp.int32))
            hidden = jax.eval_shape(stages.enter, outer, micro)
            return stages.leave_with(report, outer, jnp.zeros(hidden.shape, hidden.dtype), micro)

        report_gradient = jax.grad(reported, has_aux=True)(zero)[0]
        result = run_pipeline(
            self.schedule,
            StagedModel(
                stages.microbatch, stages.enter, stages.run_stage, stages.leave, hidden_axes
            ),
            outer,
            layers,
            inputs,
            jax.tree.map(lambda x: x[: split.places], report_gradient),
            split,
            self.free,
        )
        _, (value, report) = jax.jvp(reported, (zero,), (result.report,))
        report = jax.tree.map(jnp.add, result.sums, report)
        gradients = {**result.outer, LAYERS: result.layers}
        return result.value + value, report, constrain_tree(gradients, self.shardings)


def build_pipelined(
    loss: Loss,
    train: TrainConfig,
    mesh: Mesh,
    trainable: Any,
    partition: Partition,
    layout: Layout,
) -> MeanGradients:
    """Returns the gradients through the pipeline that a mesh and a config name.

    A model of two stacks, and one that is trained in part, are not cut into parts; JAX
    differentiates through their stages.

    Args:
      loss: what is minimized.
      train: the microbatches and the schedule.
      mesh: the devices.
      trainable: abstract parameters.
      partition: which parameters are trained.
      layout: of the gradients.

    Raises:
      UserError: the loss has no layers; `mesh_checks.check_schedule` says more.
    """
    devices = mesh.shape[PIPELINE_AXIS]
    config = train.pipeline
    schedule = make_schedule(config.schedule, devices, train.accumulation, config.chunks)
    if not isinstance(loss, LayeredLoss):
        raise UserError("mesh.pipeline", devices, ": this loss has no layers to cut. Use 1.")
    if partition is not EVERYTHING or "encoder" in trainable:
        staged = on_stages(loss, train, mesh)
        return functools.partial(mean_gradients, staged, shardings=layout.gradients)

    layers = nn.unbox(trainable[LAYERS])
    free = jax.tree.map(
        lambda x, sharding: without_stages(sharding, x.shape), layers, layout.gradients[LAYERS]
    )
    return PipelinedLoss(loss, schedule, layout.gradients, free)


def on_stages(loss: Loss, train: TrainConfig, mesh: Mesh) -> Loss:
    """Returns a loss whose layers are run on the stages of a mesh, if it has some."""
    devices = mesh.shape[PIPELINE_AXIS]
    if devices == 1 or not isinstance(loss, LayeredLoss):
        return loss
    return loss.with_loop(StagedLoop(devices, train.accumulation))


def _report_shape(loss: PipelinedLoss, outer: Any, layers: Any, inputs: _Micro) -> LayerReport:
    """Returns the shape of what all layers report together."""
    stages = _Stages(loss.loss, loss.schedule, None)
    index = jnp.zeros((), jnp.int32)
    micro = stages.microbatch(inputs, index)
    hidden = jax.eval_shape(stages.enter, outer, micro)
    every_layer = LayerRange(index, None)
    _, report = jax.eval_shape(stages.run_stage, outer, layers, every_layer, hidden, micro)
    return report


@dataclasses.dataclass(frozen=True)
class _Stages:
    """The parts of a loss, as `StagedModel` has them.

    Attributes:
      loss: of a model with stacked layers.
      schedule: of its microbatches.
      report: the shape of what all layers report.
    """

    loss: LayeredLoss
    schedule: PipelineSchedule
    report: LayerReport | None

    def zero_report(self) -> LayerReport:
        """Returns the report of layers that have nothing to say."""
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), self.report)

    def microbatch(self, inputs: _Micro, index: Int[Array, ""]) -> _Micro:
        """Returns the inputs of a microbatch."""
        count = self.schedule.microbatches
        rows = microbatch_of(inputs.batch, index, count)
        key = inputs.key if count == 1 else jax.random.fold_in(inputs.key, index)
        return inputs._replace(batch=rows, key=key)

    def split(
        self, outer: Any, layers: Any, inputs: _Micro
    ) -> tuple[StageSplit, tuple[str, str, str]]:
        """Returns which layers each stage has, and the logical axes of hidden states."""
        groups = []

        def note(outer: Any, inputs: _Micro) -> Hidden:
            index = jnp.zeros((), jnp.int32)
            micro = self.microbatch(inputs, index)
            entered = self._entered(outer, micro)
            groups.append(entered.group)
            return entered.x

        # Traced alone: these are constants of the model.
        jax.eval_shape(note, outer, inputs)
        any_leaf = jax.tree.leaves(layers)[0]
        num_layers = any_leaf.shape[0]
        (group,) = groups
        schedule = self.schedule
        split = StageSplit(num_layers, group.period, schedule.devices, schedule.chunks)
        return split, group.hidden_axes

    def enter(self, outer: Any, micro: _Micro) -> Hidden:
        """Returns the hidden states before the first layer."""
        return self._entered(outer, micro).x

    def run_stage(
        self, outer: Any, layers: Any, own: LayerRange, x: Hidden, micro: _Micro
    ) -> tuple[Hidden, LayerReport]:
        """Runs consecutive layers: those of a stage, in its places."""
        entered = self._entered(outer, micro)
        stage = layers_in_places(entered.group, layers, own)
        x, _, reports = Scanned().run(stage, x, None, entered.context)
        return x, reports[LAYERS]

    def leave(self, outer: Any, x: Hidden, micro: _Micro) -> tuple[Float[Array, ""], Report]:
        """Returns what is minimized of a microbatch, but for what the layers report."""
        return self.leave_with(self.zero_report(), outer, x, micro)

    def leave_with(
        self, report: LayerReport, outer: Any, x: Hidden, micro: _Micro
    ) -> tuple[Float[Array, ""], Report]:
        """Returns what is minimized of a microbatch, from the last layer's hidden states and what
        all layers report.
        """
        loss = self.loss.with_loop(_GiveOutput(x, report))
        result = loss.sums(outer, micro.frozen, micro.batch, micro.key)
        return minimized_mean(*result, micro.weight, self.schedule.microbatches)

    def _entered(self, outer: Any, micro: _Micro) -> _Entered:
        """Returns what goes into the layers."""
        note = _NoteInput([])
        self.loss.with_loop(note).hidden(outer, micro.frozen, micro.batch, micro.key)
        (entered,) = note.found
        return entered

"""Runs layers on the stages of a pipeline, forward: JAX differentiates through it.

It is for a model that is not cut into a pipeline's parts (`parallel.pipeline`): evaluation, a model
with two stacks of layers, one whose parameters are trained in part. Its schedule is GPipe's: all
microbatches pass all stages, and backward all of them pass in the reverse order.

Source: Huang et al. 2019 (GPipe), arXiv:1811.06965, section 2.3.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from research.parallel.mesh_axes import PIPELINE_AXIS
from research.parallel.rules import constrain
from research.parallel.shard_map import shard_map
from research.parallel.stages import LayerRange, StageSplit

Hidden = Float[Array, "B T D"]
# (layers of a stage, which they are, hidden states, inputs that all microbatches share, index of
# the microbatch) -> (hidden states, report)
RunStage = Callable[[Any, LayerRange, Hidden, Any, Int[Array, ""]], tuple[Hidden, Any]]


def run_stages(
    split: StageSplit,
    run_stage: RunStage,
    layers: Any,
    x: Float[Array, "M B T D"],
    shared: Any,
    hidden_axes: tuple[str, ...],
) -> tuple[Float[Array, "M B T D"], Any]:
    """Returns the hidden states behind all layers, and the reports `[L, …]`, summed over the
    microbatches.

    Args:
      split: of the layers, with one chunk on each device.
      run_stage: runs a stage's layers.
      layers: parameters, `[L, …]`.
      x: hidden states before them, by microbatch.
      shared: what else is read: arrays of all microbatches.
      hidden_axes: the logical axes of hidden states.
    """

    def on_device(staged: Any, x: Array, shared: Any) -> tuple[Array, Any]:
        place = jax.lax.axis_index(PIPELINE_AXIS)
        layer_range = split.layers_of(place)
        # [1, 1, S, …] -> [S, …]
        own = jax.tree.map(lambda leaf: leaf[0, 0], staged)

        # Only the input of a stage is kept, for each microbatch.
        @jax.checkpoint
        def run(own: Any, x: Hidden, shared: Any, index: Array) -> tuple[Hidden, Any]:
            return run_stage(own, layer_range, x, shared, index)

        def run_own(x: Hidden, index: Array) -> tuple[Hidden, Any]:
            return run(own, x, shared, index)

        outputs, report = _run_ticks(run_own, x, split.devices, hidden_axes)
        # The last stage's outputs go to all devices.
        is_last = place == split.devices - 1
        outputs = jnp.where(is_last, outputs, 0)
        outputs = jax.lax.psum(outputs, PIPELINE_AXIS)
        # [S, …] -> [1, 1, S, …]
        report = jax.tree.map(lambda leaf: leaf[None, None], report)
        return outputs, report

    by_device = PartitionSpec(None, PIPELINE_AXIS)
    everywhere = PartitionSpec()
    run_all = shard_map(
        on_device,
        (by_device, everywhere, everywhere),
        (everywhere, by_device),
        axes=(PIPELINE_AXIS,),
    )
    staged = split.by_stage(layers)
    outputs, report = run_all(staged, x, shared)
    return outputs, split.by_layer(report)


def _run_ticks(
    run: Callable[[Hidden, Int[Array, ""]], tuple[Hidden, Any]],
    x: Float[Array, "M B T D"],
    devices: int,
    hidden_axes: tuple[str, ...],
) -> tuple[Float[Array, "M B T D"], Any]:
    """Returns what a device's stage gives for each microbatch, if it is the last one, and the sum
    of its reports.

    Args:
      run: the stage, of hidden states and the index of their microbatch.
      x: hidden states before the first stage, by microbatch.
      devices: stages, P.
      hidden_axes: the logical axes of hidden states.
    """
    microbatches = x.shape[0]
    last = devices - 1
    place = jax.lax.axis_index(PIPELINE_AXIS)
    pairs = [(stage, stage + 1) for stage in range(last)]

    def tick(arrived: Hidden, time: Array) -> tuple[Hidden, tuple[Hidden, Any]]:
        # Stage s has microbatch t - s in tick t; before and after those, nothing that is needed.
        index = time - place
        has_begun = index >= 0
        is_active = has_begun & (index < microbatches)
        index = jnp.clip(index, 0, microbatches - 1)
        own_x = constrain(x, (None, *hidden_axes))
        entered = own_x[index]
        own_input = jnp.where(place == 0, entered, arrived)

        y, report = run(own_input, index)
        report = jax.tree.map(lambda leaf: jnp.where(is_active, leaf, 0), report)
        sent = jax.lax.ppermute(y, PIPELINE_AXIS, pairs)
        return sent, (y, report)

    nothing = jnp.zeros_like(x[0])
    times = jnp.arange(microbatches + last)
    _, (outputs, reports) = jax.lax.scan(tick, nothing, times)
    # The last stage has microbatch m in tick m + P - 1.
    own_outputs = outputs[last:]
    report = jax.tree.map(lambda leaf: leaf.sum(axis=0), reports)
    return own_outputs, report

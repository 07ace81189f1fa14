"""Runs a pipeline schedule: value and gradients of a model whose layers are cut into stages.

The program is the same on every device along the mesh axis `pipeline`: a loop over the ticks of the
schedule, in which each device looks up what it has to do (`pipeline_device`). The other mesh axes
stay with the partitioner, inside the operations too.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from research.parallel.mesh_axes import PIPELINE_AXIS
from research.parallel.pipeline_device import PipelineDevice
from research.parallel.pipeline_operations import PipelineResult, StagedModel, StageOperations
from research.parallel.pipeline_schedule import PipelineSchedule
from research.parallel.shard_map import shard_map
from research.parallel.stages import StageSplit

__all__ = ["PipelineResult", "StagedModel", "run_pipeline"]


def run_pipeline(
    schedule: PipelineSchedule,
    model: StagedModel,
    outer: Any,
    layers: Any,
    inputs: Any,
    report_gradient: Any,
    split: StageSplit,
    free: Any = None,
) -> PipelineResult:
    """Returns the value and the gradients, summed over the microbatches of a batch.

    Args:
      schedule: for as many devices as `pipeline` has.
      model: the parts.
      outer: parameters of what is no stage.
      layers: parameters of the layers, `[L, …]`.
      inputs: of a batch.
      report_gradient: the gradient of what is minimized with respect to the reports of the layers
          of a stage, a constant.
      split: of the layers, for the schedule's devices and chunks.
      free: the shardings of `layers` that leave them together; see `StageSplit.by_stage`.
    """

    def on_device(outer: Any, staged: Any, inputs: Any, report_gradient: Any) -> PipelineResult:
        # [chunks, 1, layers of a chunk, …] -> [chunks, layers of a chunk, …]
        own = jax.tree.map(lambda x: x[:, 0], staged)
        stage = StageOperations(schedule, model, split, outer, own, inputs, report_gradient)
        result = PipelineDevice(schedule, stage).run()
        report, gradients = jax.tree.map(lambda x: x[:, None], (result.report, result.layers))
        return result._replace(report=report, layers=gradients)

    by_device = PartitionSpec(None, PIPELINE_AXIS)
    everywhere = PartitionSpec()
    run = shard_map(
        on_device,
        (everywhere, by_device, everywhere, everywhere),
        PipelineResult(everywhere, everywhere, by_device, everywhere, by_device),
        axes=(PIPELINE_AXIS,),
    )
    staged = split.by_stage(layers, free)
    result = run(outer, staged, inputs, report_gradient)
    return result._replace(
        report=split.by_layer(result.report),
        layers=split.by_layer(result.layers, free),
    )

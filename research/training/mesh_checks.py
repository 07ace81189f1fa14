"""Whether a model has something for each axis of a mesh to shard."""

import dataclasses
from collections.abc import Mapping

from research.core.errors import UserError
from research.models.config import ModelConfig
from research.parallel.pipeline_schedule import make_schedule
from research.parallel.stages import StageSplit
from research.training.config import PipelineConfig, TrainConfig


def check_axes(
    model: ModelConfig, sizes: Mapping[str, int], chunks: int = 1, length: int | None = None
) -> None:
    """Raises UserError where a model has nothing that a mesh axis of more than one device shards,
    exchanges heads in groups that do not fit, or has too few layers for its stages.

    Args:
      model: that is trained.
      sizes: of the mesh axes, by name.
      chunks: of a stage's layers, `train.pipeline.chunks`.
      length: tokens of a row; None is any that fits.
    """
    shards = sizes["expert"]
    has_experts = model.experts is not None and any(layer.experts for layer in model.layers())
    if shards > 1 and not has_experts:
        raise UserError(
            "mesh.expert",
            shards,
            ": no layer of the model has experts. Use 1, and mesh.data or mesh.fsdp for these "
            "devices.",
        )

    # Where tensor does not divide the heads, the sharding of parameters says so.
    heads = model.attention.num_heads
    if sizes["context"] > 1 and heads % sizes["tensor"] == 0:
        model.attention.exchange.check_groups(sizes["context"], heads // sizes["tensor"])

    shards = sizes["context"] * sizes["tensor"]
    if model.sequence_parallel and length is not None and length % shards:
        fits = max(1, length // shards) * shards
        raise UserError(
            "train.sequence_length",
            length,
            f"is not a multiple of mesh.context × mesh.tensor = {shards}, as "
            f"model.sequence_parallel needs. Use {fits}.",
        )

    stages = sizes["pipeline"]
    if stages > 1 and model.layer_loop == "unroll":
        raise UserError(
            "mesh.pipeline", stages, "needs stacked layers. Use model.layer_loop = 'scan'."
        )
    if stages > 1:
        stage_splits(model, stages, chunks)


def check_schedule(model: ModelConfig, train: TrainConfig, sizes: Mapping[str, int]) -> None:
    """Raises UserError where a pipeline's schedule does not fit the model or the mesh.

    Args:
      model: that is trained.
      train: how.
      sizes: of the mesh axes, by name.
    """
    stages = sizes["pipeline"]
    config = train.pipeline
    # With one stage too: what no pod takes is refused on a laptop already.
    make_schedule(config.schedule, stages, train.accumulation, config.chunks)
    if stages == 1:
        return

    is_whole = model.structure != "encoder_decoder" and train.trainable.select == "all"
    is_gpipe = config.schedule == "gpipe" and config.chunks == 1
    if not (is_whole or is_gpipe):
        raise UserError(
            "train.pipeline.schedule",
            config.schedule,
            "needs one stack of layers and all parameters trained. Use 'gpipe' without chunks.",
        )
    for axis in ("context", "expert"):
        if config.schedule == "zero_bubble" and sizes[axis] > 1:
            # In a tick of different kinds, a permutation among all devices would wait for ever.
            raise UserError(
                f"mesh.{axis}",
                sizes[axis],
                "must be 1 with train.pipeline.schedule = 'zero_bubble'. Use '1f1b'.",
            )


def unused_schedule(train: TrainConfig, stages: int) -> str | None:
    """Returns that the pipeline's settings do nothing, where there are some and one stage."""
    config = train.pipeline
    if stages > 1 or config == PipelineConfig():
        return None
    return (
        f"train.pipeline = {config.schedule!r} with {config.chunks} chunk(s) does nothing: "
        "mesh.pipeline = 1 has no stages."
    )


def stacked_for_stages(model: ModelConfig, stages: int) -> ModelConfig:
    """Returns the model with its layers stacked where there are several stages, which are parts of
    stacked layers, and the config leaves it open.
    """
    if stages == 1 or model.layer_loop != "auto":
        return model
    return dataclasses.replace(model, layer_loop="scan")


def stage_splits(model: ModelConfig, stages: int, chunks: int) -> list[StageSplit]:
    """Returns how the layers of the decoder, and of the encoder where there are both, are cut.

    Args:
      model: that is trained.
      stages: devices along `pipeline`.
      chunks: of each of them.

    Raises:
      UserError: a stage has no layer.
    """
    stacks = {"the model": model}
    if model.structure == "encoder_decoder":
        stacks = {"the decoder": model, "the encoder": model.encoder()}
    splits = []
    for name, stack in stacks.items():
        # The first layers are no part of a stage.
        depth = stack.num_layers - len(stack.first_layers)
        splits.append(StageSplit(depth, len(stack.pattern), stages, chunks, name))
    return splits

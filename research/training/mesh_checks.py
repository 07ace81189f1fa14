"""Whether a model has something for each axis of a mesh to shard."""

from collections.abc import Mapping

from research.core.errors import UserError
from research.models.config import ModelConfig


def check_axes(model: ModelConfig, sizes: Mapping[str, int]) -> None:
    """Raises UserError where a model has nothing that a mesh axis of more than one device shards,
    or exchanges heads in groups that do not fit.

    Args:
      model: that is trained.
      sizes: of the mesh axes, by name.
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

    # Each stage of the pipeline has at least one layer.
    depths = {"num_layers": model.num_layers}
    if model.structure == "encoder_decoder":
        depths["encoder_layers"] = model.encoder_layers
    stages = sizes["pipeline"]
    for field, depth in depths.items():
        if stages > depth:
            raise UserError(
                "mesh.pipeline",
                stages,
                f"is more than model.{field} = {depth}: a stage has at least one layer.",
            )

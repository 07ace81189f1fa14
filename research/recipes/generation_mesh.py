"""The mesh that a trained model runs on, and how its parameters are sharded there."""

import math
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from research.core import config as configs
from research.core.errors import UserError
from research.models.config import ModelConfig
from research.parallel.mesh import make_mesh
from research.parallel.mesh_axes import CONTEXT_AXIS, PIPELINE_AXIS
from research.parallel.mesh_config import MeshConfig, resolve_sizes
from research.parallel.rules import param_shardings
from research.training.mesh_checks import check_axes


def mesh_for_generation(model: ModelConfig, sizes: Mapping[str, Any]) -> tuple[Mesh, int]:
    """Returns the mesh over the first devices of this process, as many as the sizes say, and the
    ZeRO level.

    Args:
      model: that runs on it.
      sizes: fields of `MeshConfig`; axes that are left out have size 1, -1 is what is left of all
        devices.

    Raises:
      UserError: an axis that generation or the model cannot use, or more devices than there are.
    """
    config = configs.bind(MeshConfig, {"data": 1, **sizes}, "mesh")
    check_generation_axes(config)
    devices = jax.local_devices()
    axis_sizes = config.sizes()
    if -1 not in axis_sizes.values():
        # tensor 2 of 8 devices: the first two.
        count = _num_devices(axis_sizes, len(devices))
        devices = devices[:count]
    resolved = resolve_sizes(config, len(devices))
    check_axes(model, resolved)
    mesh = make_mesh(config, devices)
    return mesh, config.zero


def check_generation_axes(config: MeshConfig) -> None:
    """Raises UserError where a mesh has an axis that shards what generation has too little of."""
    for axis, what in ((PIPELINE_AXIS, "layers"), (CONTEXT_AXIS, "the tokens of a row")):
        size = config.sizes()[axis]
        if size != 1:
            raise UserError(
                f"mesh.{axis}",
                size,
                f"shards {what} in training alone. Use 1, and mesh.tensor or mesh.data for these "
                "devices.",
            )


def shardings_for_generation(boxed: Any, mesh: Mesh | AbstractMesh, zero: int) -> Any:
    """Returns the sharding of each boxed parameter.

    Raises:
      UserError: a mesh axis does not divide what it shards.
    """
    return param_shardings(boxed, mesh, shard_width=zero == 3, width="embed_in_generation")


def _num_devices(sizes: Mapping[str, int], available: int) -> int:
    """Returns the product of the sizes; raises UserError where it is more than there are."""
    needed = math.prod(sizes.values())
    if needed <= available:
        return needed

    # data 2 and tensor 8 of 8 devices: tensor is the larger one, and may be at most 4.
    largest = max(sizes, key=sizes.__getitem__)
    others = needed // sizes[largest]
    advice = f"Use at most {available // others}."
    if others > available:
        used = [f"mesh.{name}" for name in sizes if sizes[name] > 1]
        used.remove(f"mesh.{largest}")
        too = " and ".join(used)
        advice = f"Lower {too} too."
    raise UserError(
        f"mesh.{largest}",
        sizes[largest],
        f"makes a mesh of {needed} devices, and there are {available}. {advice}",
    )

"""Loading the model of a workdir."""

import contextlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from research.core import config as configs
from research.data import tokenizers
from research.models.config import ModelConfig
from research.models.language_model import abstract_boxed_params
from research.parallel.target import mesh_platform, platform
from research.recipes.generation_mesh import mesh_for_generation, shardings_for_generation
from research.recipes.loaded import LoadedModel
from research.recipes.workdir import read_config
from research.storage.paths import Path, as_path
from research.training.checkpoints import CheckpointConfig, Checkpoints


def load(workdir: str | Path, mesh: Mapping[str, Any] | None = None) -> LoadedModel:
    """Loads the newest good checkpoint of a workdir, averaged parameters where the run kept them.

    Args:
      workdir: of a training run or a conversion.
      mesh: sizes of mesh axes, `{"tensor": 2}`, as of `mesh_for_generation`; None is one device.

    Raises:
      UserError: no workdir, no checkpoint, or none that is whole; a mesh that does not fit.
    """
    workdir = as_path(workdir, "workdir")
    config = configs.bind(ModelConfig, read_config(workdir)["model"], "model")
    devices_mesh = None
    if mesh:
        devices_mesh, zero = mesh_for_generation(config, mesh)
        boxed = abstract_boxed_params(config, mesh_platform(devices_mesh))
        shardings = shardings_for_generation(boxed, devices_mesh, zero)
    else:
        boxed = abstract_boxed_params(config, platform())
        device = jax.local_devices()[0]
        sharding = jax.sharding.SingleDeviceSharding(device)
        shardings = jax.tree.map(lambda _: sharding, nn.unbox(boxed))

    plain = nn.unbox(boxed)
    shapes = jax.tree.map(_place, plain, shardings)
    with contextlib.closing(Checkpoints(workdir, CheckpointConfig())) as checkpoints:
        # The first of the two fields that the checkpoint has.
        step, params = checkpoints.restore_params(shapes, fields=("ema", "params"))
    tokenizer = tokenizers.load(workdir / "tokenizer")
    return LoadedModel(config, params, tokenizer, step, devices_mesh)


def _place(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

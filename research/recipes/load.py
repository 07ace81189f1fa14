"""Loading the model of a workdir."""

import contextlib
from typing import Any

import jax

from research.core import config as configs
from research.data import tokenizers
from research.models.config import ModelConfig
from research.models.language_model import abstract_params
from research.parallel.target import platform
from research.recipes.loaded import LoadedModel
from research.recipes.workdir import read_config
from research.storage.paths import Path, as_path
from research.training.checkpoints import CheckpointConfig, Checkpoints


def load(workdir: str | Path) -> LoadedModel:
    """Loads the newest good checkpoint of a workdir, averaged parameters where the run kept them.

    Raises:
      UserError: no workdir, no checkpoint, or none that is whole.
    """
    workdir = as_path(workdir, "workdir")
    config = configs.bind(ModelConfig, read_config(workdir)["model"], "model")
    shapes = _on_one_device(abstract_params(config, platform()))
    with contextlib.closing(Checkpoints(workdir, CheckpointConfig())) as checkpoints:
        # The first of the two fields that the checkpoint has.
        step, params = checkpoints.restore_params(shapes, fields=("ema", "params"))
    return LoadedModel(config, params, tokenizers.load(workdir / "tokenizer"), step)


def _on_one_device(shapes: Any) -> Any:
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def place(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, shapes)

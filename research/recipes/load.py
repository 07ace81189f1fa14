"""Loading the model of a workdir."""

import contextlib
import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from research.core import config as configs
from research.core.errors import UserError, nearest
from research.data import tokenizers
from research.models.config import DTYPES, ModelConfig
from research.models.language_model import abstract_boxed_params, abstract_params
from research.parallel.target import mesh_platform, platform
from research.recipes.generation_mesh import mesh_for_generation, shardings_for_generation
from research.recipes.loaded import LoadedModel
from research.recipes.workdir import read_config
from research.storage.paths import Path, as_path
from research.training.checkpoints import CheckpointConfig, Checkpoints

# Fields of a checkpoint that may have the parameters: the first that it has.
FIELDS = ("ema", "params")


def load(
    workdir: str | Path,
    mesh: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    *,
    unroll: bool = False,
) -> LoadedModel:
    """Returns the model of a workdir: `config`, `params`, `tokenizer`, `logits(tokens)`,
    `generate(prompts)`; `embed(texts)`, `score(texts)`, `classify(texts)`, `score_pairs(pairs)` and
    `fill_masks(texts)` of given texts.

    Parameters are the averaged ones where the run kept them. They are read a part at a time into
    their shards, so that of another type than `dtype` there are never more than some parts in
    memory.

    Args:
      workdir: of a training run or a conversion; its newest whole checkpoint is read.
      mesh: shards the model over devices: `{"tensor": 2}`, whatever mesh it was trained on; see
        `mesh_for_generation`. None is one device.
      dtype: of parameters and activations, `float32` or `bfloat16`; None is those of the config.
      unroll: whether each layer has parameters of its own, which guesses by first layers need; else
        they are stacked where the config says so.

    Raises:
      UserError: no workdir, no checkpoint, or none that is whole; a mesh that does not fit, or an
        unknown type.
    """
    workdir = as_path(workdir, "workdir")
    saved = configs.bind(ModelConfig, read_config(workdir)["model"], "model")
    if unroll:
        saved = dataclasses.replace(saved, layer_loop="unroll")
    config = saved if dtype is None else in_dtype(saved, dtype)
    devices_mesh = None
    if mesh:
        devices_mesh, zero = mesh_for_generation(config, mesh)
        on_platform = mesh_platform(devices_mesh)
        boxed = abstract_boxed_params(config, on_platform)
        shardings = shardings_for_generation(boxed, devices_mesh, zero)
    else:
        on_platform = platform()
        boxed = abstract_boxed_params(config, on_platform)
        device = jax.local_devices()[0]
        sharding = jax.sharding.SingleDeviceSharding(device)
        shardings = jax.tree.map(lambda _: sharding, nn.unbox(boxed))

    stored = abstract_params(saved, on_platform)
    plain = nn.unbox(boxed)
    served = jax.tree.map(_place, plain, shardings)
    with contextlib.closing(Checkpoints(workdir, CheckpointConfig())) as checkpoints:
        step, params = checkpoints.stream_params(stored, served, FIELDS)
        digest = checkpoints.params_digest(step, FIELDS)
    tokenizer = tokenizers.load(workdir / "tokenizer")
    return LoadedModel(config, params, tokenizer, step, devices_mesh, digest)


def in_dtype(config: ModelConfig, dtype: str) -> ModelConfig:
    """Returns a model with parameters and activations of a type.

    Raises:
      UserError: it is not known.
    """
    if dtype not in DTYPES:
        raise UserError("dtype", dtype, f"is not known. {nearest(dtype, DTYPES)}")
    return dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def _place(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

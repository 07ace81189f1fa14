"""What the interop tests share: golden folders, logits of a whole batch."""

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from research.models.config import ModelConfig
from research.models.transformer import Transformer
from tests.interop import cases

# Of logits up to 6. Float32 itself puts torch's own logits up to 1.4e-5 from those it computes in
# float64.
TOLERANCE = 3e-5


def golden_folder(parent: pathlib.Path, name: str) -> pathlib.Path:
    """Writes the Hugging Face folder of a golden case."""
    stored = cases.stored()[name]
    return write_folder(parent / name, stored["config"], cases.weights(stored["tensors"]))


def write_folder(
    folder: pathlib.Path, fields: dict[str, Any], tensors: dict[str, np.ndarray]
) -> pathlib.Path:
    """Writes a Hugging Face folder as transformers would."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def _apply(config: ModelConfig, params: Any, tokens: jax.Array) -> jax.Array:
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)

    def apply(module: Transformer) -> Any:
        return module.logits(module({"tokens": tokens, "positions": positions}).hidden)

    return Transformer(config).apply({"params": params}, method=apply)


def logits_of(config: ModelConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    """Returns float32 logits `[B, T, V]` of whole sequences."""
    return np.asarray(
        jax.jit(lambda params: _apply(config, params, jnp.asarray(tokens, jnp.int32)))(params)
    )

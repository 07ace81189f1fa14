"""Shrunk presets that no checkpoint of transformers holds, whose parts it has: weights, a batch, what a model makes."""

import functools
from typing import Any

import jax
import numpy as np

from research.core.trees import named_leaves
from research.interop.mapping import Piece, parameters, unrolled_shapes
from research.models.config import ModelConfig
from tests.interop import cases, encoders_cases
from tests.interop.cases import Case

Named = dict[str, np.ndarray]

LENGTH = 40
# Tokens of each row's prefix, where there is one; tokens of each row that an encoder reads, where there is one.
PREFIXES, SOURCES = (0, 1, 17, LENGTH), (LENGTH + 6, 31, 1, LENGTH)
_SHAPE = "embed_dim=32 attention.num_heads=4 attention.num_kv_heads=4 attention.head_dim=8 max_length=64"

CASES = {
    "transformer": Case("transformer.py:base", f"{_SHAPE} mlp.hidden_dim=48 encoder_layers=3"),
    "gpt-3": Case("gpt3.py:small", f"{_SHAPE} mlp.hidden_dim=80 num_layers=3 pattern.1.window=8"),
    "gopher": Case("gopher.py:44m", f"{_SHAPE} mlp.hidden_dim=80"),
    # Its head divides by the root of the width.
    "prefix": Case(
        "prefix.py:base",
        f"{_SHAPE} mlp.hidden_dim=48 head.scale={32**-0.5} position.num_buckets=8 position.max_distance=24",
    ),
    "prefix-llama": Case("llama.py:3-8b", f"{_SHAPE} mlp.hidden_dim=48 attention.num_kv_heads=2 structure=prefix"),
    "prefix-gpt2": Case("gpt2.py:small", f"{_SHAPE} mlp.hidden_dim=48 structure=prefix"),
}


@functools.cache
def config(name: str) -> ModelConfig:
    """Returns the model of a case."""
    return CASES[name].config()


def weights(config: ModelConfig) -> Named:
    """Returns the parameters by their names in an unrolled model."""
    shapes = {name: list(shape.shape) for name, shape in unrolled_shapes(config).items()}
    found = cases.weights({name.replace("/scale", "/weight"): shape for name, shape in shapes.items()})
    return {name.replace("/weight", "/scale"): value for name, value in found.items()}


def batch(config: ModelConfig) -> Named:
    """Returns what a model reads, and `targets` and `weights`."""
    random, rows = np.random.RandomState(3), len(PREFIXES)
    tokens, targets = random.randint(0, cases.VOCAB, (2, rows, LENGTH))
    index = np.arange(LENGTH)
    found = {"tokens": tokens, "targets": targets, "positions": np.broadcast_to(index, tokens.shape)}
    if config.structure == "prefix":
        found["prefix"] = index < np.array(PREFIXES)[:, None]
    if config.structure == "encoder_decoder":
        index = np.arange(max(SOURCES))
        found["encoder_tokens"] = random.randint(0, cases.VOCAB, (rows, max(SOURCES)))
        found["encoder_positions"] = np.broadcast_to(index, found["encoder_tokens"].shape)
        found["encoder_segments"] = index < np.array(SOURCES)[:, None]
    found = {name: value.astype(np.int32) for name, value in found.items()}
    return found | {"weights": np.ones(tokens.shape, np.float32)}


def tree(config: ModelConfig, named: Named) -> Any:
    """Returns named parameters as the model's tree."""
    return parameters(config, (Piece(name, (), value) for name, value in named.items()))


@functools.cache
def ours(name: str) -> tuple[np.ndarray, Named]:
    """Returns the logits of a case, and the gradients of its mean cross-entropy by name."""
    model = config(name)
    gradients, (logits, _) = encoders_cases.computation(model)(tree(model, weights(model)), batch(model))
    return np.asarray(logits), jax.tree.map(np.asarray, named_leaves(gradients))


def golden(name: str) -> Named:
    """Returns what torch made of it: `logits`, and the facts of the `gradients`."""
    with np.load(cases.GOLDENS / "presets.npz") as arrays:
        return {key: arrays[f"{name}/{key}"] for key in ("logits", "gradients")}

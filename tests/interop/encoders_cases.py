"""The golden cases of families that are no LLaMA: a batch for each, and what a model makes of it."""

import functools
import json
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.core.trees import named_leaves
from research.data.batch import model_inputs
from research.interop.architecture import config_from, fields_of
from research.interop.huggingface import ARCHITECTURES
from research.interop.mapping import params_from, tensors_from
from research.models.config import ModelConfig
from research.models.transformer import Transformer
from tests.interop import cases

# Tokens from here on: those before are padding to some of the models.
FIRST_TOKEN = 3
# The longest sequence of a case, where it is not this: T5's distances share a bucket from 128 on.
LENGTH, LENGTHS = 32, {"t5": 150}
# Tokens of the encoder's second row; the others are padding.
REAL = 0.75

Batch = dict[str, np.ndarray]


def batch(name: str, config: ModelConfig) -> Batch:
    """Returns what a model reads, and `targets` and `weights`: padding has none."""
    random, length = np.random.RandomState(2), LENGTHS.get(name, LENGTH)
    found = _tokens(random, length, padded=config.structure == "encoder", prefix="")
    found["targets"] = random.randint(FIRST_TOKEN, cases.VOCAB, found["tokens"].shape)
    found["weights"] = (found["segments"] != 0).astype(np.float32)
    if config.structure == "encoder_decoder":
        found |= _tokens(random, length + 10, padded=True, prefix="encoder_")
    if config.embedding.num_types > 1:
        found["types"] = random.randint(0, config.embedding.num_types, found["tokens"].shape)
    if config.head.num_classes:
        found["classes"] = random.randint(0, config.head.num_classes, found["tokens"].shape[:1])
    return {name: value if value.dtype == np.float32 else value.astype(np.int32) for name, value in found.items()}


def _tokens(random: np.random.RandomState, length: int, padded: bool, prefix: str) -> Batch:
    tokens = random.randint(FIRST_TOKEN, cases.VOCAB, (2, length))
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    real = np.array([[length], [round(REAL * length) if padded else length]])
    return {f"{prefix}tokens": tokens, f"{prefix}positions": positions, f"{prefix}segments": (positions < real) * 1}


@functools.cache
def computation(config: ModelConfig) -> Any:
    """Returns a function of parameters and batch: the gradient of the mean cross-entropies, the logits of `logits_of`.

    Some families have equal models.
    """

    def loss(params: Any, given: Any) -> Any:
        words, classes = logits_of(config, params, given)
        total = _cross_entropy(words, given["targets"], given["weights"])
        if classes is not None:
            total += _cross_entropy(classes, given["classes"], jnp.ones(classes.shape[0]))
        return total, (words, classes)

    return jax.jit(jax.grad(loss, has_aux=True))


def logits_of(config: ModelConfig, params: Any, given: Batch) -> tuple[jax.Array, jax.Array | None]:
    """Returns the logits of the words and of the classes, if any."""
    inputs = model_inputs(jax.tree.map(jnp.asarray, given))

    def apply(module: Transformer) -> Any:
        hidden = module(inputs).hidden
        return module.logits(hidden), module.pooled(hidden)[1] if config.head.pooler else None

    return nn.apply(apply, Transformer(config))({"params": params})


def _cross_entropy(logits: Any, targets: Any, weights: Any) -> Any:
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return jnp.sum(losses * weights) / weights.sum()


def stored() -> dict[str, dict[str, Any]]:
    """Returns, by case, the `config` and the `tensors` (shapes by name) that transformers wrote."""
    return json.loads((cases.GOLDENS / "encoders.json").read_text())


@functools.cache
def model(name: str) -> tuple[Any, ModelConfig, dict[str, np.ndarray]]:
    """Returns the architecture, the config and the tensors of a case."""
    fields, tensors = stored()[name]["config"], cases.weights(stored()[name]["tensors"])
    architecture = ARCHITECTURES[fields["model_type"]]
    return architecture, config_from(architecture, fields_of(architecture, fields, tensors)), tensors


@functools.cache
def golden(name: str) -> dict[str, np.ndarray]:
    """Returns what torch computed: `logits`, `classes` where there are any, and the `gradients`' facts."""
    with np.load(cases.GOLDENS / "encoders.npz") as arrays:
        return {key.partition("/")[2]: arrays[key] for key in arrays if key.partition("/")[0] == name}


@functools.cache
def ours(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the same of Tessera, and the gradients by the tensors' names."""
    architecture, config, tensors = model(name)
    given = batch(name, config)
    gradients, (words, classes) = computation(config)(params_from(architecture, config, tensors), given)
    gradients = tensors_from(architecture, config, gradients)
    found = {"logits": np.asarray(words)[given["weights"] > 0], "gradients": cases.facts(gradients)}
    return found | ({} if classes is None else {"classes": np.asarray(classes)}), gradients


def off_by(found: np.ndarray, wanted: np.ndarray) -> float:
    """Returns the largest difference, in units of the largest number."""
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def gradients_off_by(found: np.ndarray, wanted: np.ndarray) -> float:
    """Returns the largest difference between facts, in units of the gradient's norm.

    That of a key's bias is zero but for rounding, as the softmax does not see it; so small ones count by the largest.
    """
    norms = np.maximum(wanted[:, :1], 1e-3 * wanted[:, 0].max())
    return float((np.abs(found - wanted) / norms).max())


def norms_off_by(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """Returns the norm of each gradient's difference, in units of the gradient's norm; small ones as in the above."""
    norms = {name: np.linalg.norm(value) for name, value in wanted.items()}
    least = 1e-3 * max(norms.values())
    return {name: float(np.linalg.norm(found[name] - wanted[name]) / max(norms[name], least)) for name in wanted}


def same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> bool:
    """Whether tensors are the same to the bit."""
    return found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


def leaves(params: Any) -> dict[str, np.ndarray]:
    """Returns parameters by name."""
    return {name: np.asarray(value) for name, value in named_leaves(params).items()}

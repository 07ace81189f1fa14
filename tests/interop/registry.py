"""The registry of golden cases: every family beside torch. One list, whatever file holds what torch
computed.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from research.core.trees import named_leaves
from research.data.batch import model_inputs
from research.interop.architecture import Architecture, config_from, fields_of
from research.interop.huggingface import ARCHITECTURES
from research.interop.mapping import (
    ParameterSlice,
    params_from,
    params_from_slices,
    tensors_from,
    unrolled_shapes,
)
from research.models.config import ModelConfig
from research.models.transformer import Transformer
from tests.interop import cases, mtp_cases
from tests.interop.cases import Case

# Tokens from here on: those before are padding to some of the models.
FIRST_TOKEN = 3
# The longest sequence of a case, where it is not this: T5's distances share a bucket from 128 on.
LENGTH, LENGTHS = 32, {"t5": 150}
# Tokens of the encoder's second row; the others are padding.
REAL = 0.75

Named = dict[str, np.ndarray]
Batch = dict[str, np.ndarray]

# How far gradients may be from torch's, as a part of a gradient's norm.
GRADIENTS = 1e-4


@dataclasses.dataclass(frozen=True)
class Suite:
    """Cases whose goldens are alike.

    Attributes:
      logits: how far logits may be from torch's, as a part of the largest of them.
      least: gradients with a smaller part of the largest one's norm than this count by this part.
        That of a key's bias is zero but for rounding, as the softmax does not see it; and some
        experts have none, as no token goes there.
    """

    logits: float
    least: float


DECODERS, ENCODERS = Suite(logits=2e-5, least=1e-6), Suite(logits=3e-5, least=1e-3)
# Shrunk presets that transformers has the parts of, but no checkpoint; multi-token prediction.
PRESETS, MTP_SUITE = Suite(logits=3e-5, least=1e-3), Suite(logits=2e-5, least=1e-6)

PRESET_LENGTH = 40
# Tokens of each row's prefix, where there is one; tokens of each row that an encoder reads, where
# there is one.
PREFIXES, SOURCES = (0, 1, 17, PRESET_LENGTH), (PRESET_LENGTH + 6, 31, 1, PRESET_LENGTH)
_SHAPE = (
    "embed_dim=32 attention.num_heads=4 attention.num_kv_heads=4 attention.head_dim=8 max_length=64"
)
PRESET_CASES = {
    "transformer": Case("transformer.py:base", f"{_SHAPE} mlp.hidden_dim=48 encoder_layers=3"),
    "gpt-3": Case("gpt3.py:small", f"{_SHAPE} mlp.hidden_dim=80 num_layers=3 pattern.1.window=8"),
    "gopher": Case("gopher.py:44m", f"{_SHAPE} mlp.hidden_dim=80"),
    # Its head divides by the root of the width.
    "prefix": Case(
        "prefix.py:base",
        f"{_SHAPE} mlp.hidden_dim=48 head.scale={32**-0.5} position.num_buckets=8 "
        "position.max_distance=24",
    ),
    "prefix-llama": Case(
        "llama.py:3-8b", f"{_SHAPE} mlp.hidden_dim=48 attention.num_kv_heads=2 structure=prefix"
    ),
    "prefix-gpt2": Case("gpt2.py:small", f"{_SHAPE} mlp.hidden_dim=48 structure=prefix"),
}
MTP = "deepseek-v3-mtp"


@functools.cache
def stored() -> dict[str, dict[str, Any]]:
    """Returns, by case, the `config` and the `tensors` (shapes by name) that transformers wrote;
    presets have none.
    """
    encoders = json.loads((cases.GOLDENS / "encoders.json").read_text())
    return {**cases.stored(), **encoders, MTP: mtp_cases.stored()}


CASES: dict[str, Suite] = {
    **dict.fromkeys(stored(), ENCODERS),
    **dict.fromkeys(cases.stored(), DECODERS),
    **dict.fromkeys(PRESET_CASES, PRESETS),
    MTP: MTP_SUITE,
}


@dataclasses.dataclass(frozen=True)
class Model:
    """A case's model; presets have no architecture, and their tensors are the parameters by
    name.
    """

    architecture: Architecture | None
    config: ModelConfig
    params: Any
    tensors: Named


@functools.cache
def model(name: str) -> Model:
    """Returns the model of a case, with the weights that a seed gives."""
    if name in PRESET_CASES:
        config = PRESET_CASES[name].config()
        named = _preset_weights(config)
        return Model(
            None,
            config,
            params_from_slices(
                config, (ParameterSlice(key, (), value) for key, value in named.items())
            ),
            named,
        )
    fields, shapes = stored()[name]["config"], stored()[name]["tensors"]
    tensors = mtp_cases.weights(shapes) if name == MTP else cases.weights(shapes)
    architecture = ARCHITECTURES[fields["model_type"]]
    config = config_from(architecture, fields_of(architecture, fields, tensors))
    return Model(architecture, config, params_from(architecture, config, tensors), tensors)


def _preset_weights(config: ModelConfig) -> Named:
    """Returns the parameters by their names in an unrolled model."""
    shapes = {name: list(shape.shape) for name, shape in unrolled_shapes(config).items()}
    found = cases.weights(
        {name.replace("/scale", "/weight"): shape for name, shape in shapes.items()}
    )
    return {name.replace("/weight", "/scale"): value for name, value in found.items()}


@functools.cache
def batch(name: str) -> Batch:
    """Returns what a case's model reads, and `targets` and `weights`: padding has none."""
    config = model(name).config
    if CASES[name] is ENCODERS:
        found = _encoder_batch(name, config)
    elif CASES[name] is PRESETS:
        found = _preset_batch(config)
    else:
        tokens = cases.tokens()
        weights = np.ones(tokens.shape, np.float32)
        weights[:, -1] = 0  # the last token has none after it
        positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
        targets = np.roll(tokens, -1, axis=1)
        found = {"tokens": tokens, "positions": positions, "targets": targets, "weights": weights}
    return {
        key: value if value.dtype == np.float32 else value.astype(np.int32)
        for key, value in found.items()
    }


def _encoder_batch(name: str, config: ModelConfig) -> Batch:
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
    return found


def _preset_batch(config: ModelConfig) -> Batch:
    random, rows = np.random.RandomState(3), len(PREFIXES)
    tokens, targets = random.randint(0, cases.VOCAB, (2, rows, PRESET_LENGTH))
    index = np.arange(PRESET_LENGTH)
    found = {
        "tokens": tokens,
        "targets": targets,
        "positions": np.broadcast_to(index, tokens.shape),
    }
    if config.structure == "prefix":
        found["prefix"] = index < np.array(PREFIXES)[:, None]
    if config.structure == "encoder_decoder":
        index = np.arange(max(SOURCES))
        found["encoder_tokens"] = random.randint(0, cases.VOCAB, (rows, max(SOURCES)))
        found["encoder_positions"] = np.broadcast_to(index, found["encoder_tokens"].shape)
        found["encoder_segments"] = index < np.array(SOURCES)[:, None]
    return found | {"weights": np.ones(tokens.shape, np.float32)}


def _tokens(random: np.random.RandomState, length: int, padded: bool, prefix: str) -> Batch:
    tokens = random.randint(FIRST_TOKEN, cases.VOCAB, (2, length))
    positions = np.broadcast_to(np.arange(length), tokens.shape)
    real = np.array([[length], [round(REAL * length) if padded else length]])
    return {
        f"{prefix}tokens": tokens,
        f"{prefix}positions": positions,
        f"{prefix}segments": (positions < real) * 1,
    }


@functools.cache
def computation(config: ModelConfig) -> Any:
    """Returns a function of parameters and batch: the gradient of the mean cross-entropies, the
    logits of `logits_of`.

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


@functools.cache
def golden(name: str) -> Named:
    """Returns what torch computed: `logits` (or those of each `depth_…`), `classes` if any,
    `gradients` as facts.
    """
    if CASES[name] is DECODERS:
        return {key: np.load(cases.GOLDENS / f"{key}.npz")[name] for key in ("logits", "gradients")}
    if CASES[name] is MTP_SUITE:
        return mtp_cases.golden()
    with np.load(
        cases.GOLDENS / ("presets.npz" if CASES[name] is PRESETS else "encoders.npz")
    ) as arrays:
        return {
            key.partition("/")[2]: arrays[key] for key in arrays if key.partition("/")[0] == name
        }


@functools.cache
def ours(name: str) -> tuple[Named, Named]:
    """Returns the same outputs of Tessera, and its gradients by the tensors' names."""
    case, given = model(name), batch(name)
    if CASES[name] is MTP_SUITE:
        logits = mtp_cases.logits(case.config, case.params)
        outputs = {f"depth_{depth}": each for depth, each in enumerate(logits, 1)}
        return outputs, mtp_cases.without_copies(
            tensors_from(case.architecture, case.config, mtp_cases.gradients())
        )
    gradients, found = computation(case.config)(case.params, given)
    if case.architecture is None:
        return _outputs(name, *found), jax.tree.map(np.asarray, named_leaves(gradients))
    return _outputs(name, *found), tensors_from(case.architecture, case.config, gradients)


def outputs(
    name: str, config: ModelConfig, given: Batch | None = None, params: Any = None
) -> Named:
    """Returns what another model makes of a case's batch and parameters, or of others."""
    given = batch(name) if given is None else given
    found = jax.jit(lambda params: logits_of(config, params, given))(
        model(name).params if params is None else params
    )
    return _outputs(name, *found)


def _outputs(name: str, words: Any, classes: Any) -> Named:
    """Encoders' goldens hold the logits of what is no padding."""
    words = np.asarray(words)
    found = {"logits": words[batch(name)["weights"] > 0] if CASES[name] is ENCODERS else words}
    return found | ({} if classes is None else {"classes": np.asarray(classes)})


def off_by(found: Named, name: str) -> float:
    """Returns the largest difference from torch's outputs, in units of each one's largest
    number.
    """
    wanted = {key: value for key, value in golden(name).items() if key != "gradients"}
    assert found.keys() == wanted.keys()
    return max(
        float(np.abs(found[key] - value).max() / np.abs(value).max())
        for key, value in wanted.items()
    )


def facts_off_by(gradients: Named, name: str) -> float:
    """Returns how far the facts of gradients are from torch's, in units of each gradient's norm."""
    wanted = golden(name)["gradients"]
    norms = np.maximum(wanted[:, :1], CASES[name].least * wanted[:, 0].max())
    return float((np.abs(cases.facts(gradients) - wanted) / norms).max())


def norms_off_by(found: Named, wanted: Named, least: float) -> float:
    """Returns the largest norm of a gradient's difference, in units of the gradient's norm; see
    `Suite.least`.
    """
    assert found.keys() == wanted.keys()
    norms = {name: np.linalg.norm(value) for name, value in wanted.items()}
    floor = least * max(norms.values())
    return max(
        float(np.linalg.norm(found[name] - wanted[name]) / max(norms[name], floor))
        for name in wanted
    )


def changed(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    """Returns the model with other values, by dotted names."""
    for name, value in changes.items():
        first, _, rest = name.partition(".")
        inner = changed(getattr(config, first), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{first: inner})
    return config


def same(found: Named, wanted: Named) -> bool:
    """Returns whether tensors are the same to the bit."""
    return found.keys() == wanted.keys() and all(
        np.array_equal(found[name], wanted[name]) for name in wanted
    )


def leaves(params: Any) -> Named:
    """Returns parameters by name."""
    return {name: np.asarray(value) for name, value in named_leaves(params).items()}

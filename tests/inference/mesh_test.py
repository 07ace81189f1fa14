"""A mesh changes where a model and its pages lie, and no token: those of one device in float32."""

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from research.data.tokenizers.byte import ByteTokenizer
from research.inference.answers import Answer
from research.inference.beam_config import BeamConfig
from research.inference.engine import Engine
from research.inference.prompts import encode_ids
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.models.config import (
    ExpertsConfig,
    LatentConfig,
    LayerConfig,
    ModelConfig,
)
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.recipes.generation_mesh import shardings_for_generation
from tests.models.variants import VARIANTS
from tests.tiny import abstract_params, random_params, tiny_config

BYTES = ByteTokenizer()
VOCAB = 264
PROMPTS = ["ab", "a longer prompt, of more than one page", "", "xyz"]
# Greedy and drawn, by different rules.
DRAWN = [
    SamplingConfig(max_tokens=6, temperature=0.0),
    SamplingConfig(max_tokens=9, temperature=1.0, seed=1),
    SamplingConfig(max_tokens=9, temperature=0.7, top_k=5, seed=2**40),
    SamplingConfig(max_tokens=9, temperature=1.5, top_p=0.8, repetition_penalty=1.3, seed=3),
]
BEAMS = BeamConfig(num_beams=3, max_tokens=5, num_return=2)
# Prompts in several tiles and steps.
SERVE = ServeConfig(slots=4, tokens=512, rows=16, tiles=(8,), top_logprobs=8)

# Grouped queries, a sliding window in every other layer.
DENSE = tiny_config(
    vocab_size=VOCAB,
    max_length=64,
    attention={"num_heads": 8, "num_kv_heads": 4},
    pattern=(
        LayerConfig(window=3),
        LayerConfig(),
    ),
)
# Latents and experts, a shared one among them, as in DeepSeek-V3.
EXPERTS = tiny_config(
    vocab_size=VOCAB,
    max_length=64,
    first_layers=(LayerConfig(experts=False),),
    attention={
        "num_kv_heads": 4,
        "latent": LatentConfig(kv_dim=6, q_dim=10, rope_dim=4, value_dim=6),
    },
    experts=ExpertsConfig(
        num_experts=8,
        experts_per_token=3,
        hidden_dim=8,
        shared_dim=12,
        score="sigmoid",
        selection_bias=True,
        num_groups=4,
        groups_per_token=2,
        scale=2.5,
    ),
)
MODELS = {
    "dense": DENSE,
    "experts": EXPERTS,
    "encoder-decoder": dataclasses.replace(
        VARIANTS["encoder-decoder"],
        vocab_size=VOCAB,
        max_length=64,
        decoder_start_id=3,
        encoder_layers=1,
    ),
}


@functools.lru_cache
def model(name: str) -> tuple[ModelConfig, Any]:
    return MODELS[name], random_params(MODELS[name], seed=3)


def mesh_of(**sizes: int) -> Mesh:
    return make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: math.prod(sizes.values())])


def on_mesh(config: ModelConfig, params: Any, mesh: Mesh) -> Any:
    return jax.device_put(params, shardings_for_generation(abstract_params(config), mesh, 3))


def engine_of(name: str, sizes: dict[str, int] | None) -> Engine:
    """An engine over a mesh; without sizes over one device."""
    config, params = model(name)
    if sizes is None:
        return Engine(config, params, BYTES, SERVE)
    mesh = mesh_of(**sizes)
    return Engine(config, on_mesh(config, params, mesh), BYTES, SERVE, mesh)


def requests(config: ModelConfig) -> list[Request]:
    """Drawn ones, and a search."""
    ids = [tuple(each) for each in encode_ids(config, BYTES, PROMPTS)]
    drawn = [Request(each, sampling) for each, sampling in zip(ids, DRAWN, strict=True)]
    return [*drawn, Request(ids[1], beams=BEAMS)]


def tokens(answer: Answer) -> list[tuple[int, ...]]:
    found = answer.beams or [sample.completion() for sample in answer.samples]
    return [each.tokens for each in found]


def logprobs(answer: Answer) -> list[float]:
    if answer.beams:
        return [beam.score for beam in answer.beams]
    return [each.logprob for sample in answer.samples for each in sample.logprobs]


def answers(name: str, sizes: dict[str, int] | None) -> list[Answer]:
    return engine_of(name, sizes).run(requests(MODELS[name]))


alone = functools.lru_cache(functools.partial(answers, sizes=None))

# A model, and sizes of axes.
CASES = {
    "dense, tensor 2": ("dense", {"tensor": 2}),
    "dense, tensor 4": ("dense", {"tensor": 4}),
    "dense, data 2, tensor 2": ("dense", {"data": 2, "tensor": 2}),
    "dense, fsdp 4": ("dense", {"fsdp": 4}),
    "experts, tensor 4": ("experts", {"tensor": 4}),
    "experts, expert 4": ("experts", {"expert": 4}),
    "experts, data 2, expert 4": ("experts", {"data": 2, "expert": 4}),
    "experts, expert 2, tensor 2": ("experts", {"expert": 2, "tensor": 2}),
    "encoder-decoder, data 2, tensor 2": ("encoder-decoder", {"data": 2, "tensor": 2}),
}


@pytest.mark.fast_cases("dense, data 2, tensor 2")
@pytest.mark.parametrize(("name", "sizes"), CASES.values(), ids=CASES)
def test_answers_are_those_of_one_device(name: str, sizes: dict[str, int]):
    for found, expected in zip(answers(name, sizes), alone(name), strict=True):
        assert tokens(found) == tokens(expected)
        np.testing.assert_allclose(logprobs(found), logprobs(expected), atol=1e-5)

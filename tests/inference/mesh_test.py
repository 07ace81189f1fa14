"""A mesh changes where a model and its caches lie, and no token: those of one device in float32."""

import contextlib
import dataclasses
import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from research.inference.beam_step import beam_step

from research.core.random import keys_of
from research.data.tokenizers.byte import ByteTokenizer
from research.inference.beam_config import BeamConfig
from research.inference.beam_generate import beam_generate
from research.inference.generate import DecodeState, decode_step, generate, prefill_step
from research.inference.prefill import prefill
from research.inference.prompts import encode
from research.inference.sampling_config import SamplingConfig, SamplingParams
from research.models import cache as caches
from research.models.config import (
    ExpertsConfig,
    LatentConfig,
    LayerConfig,
    ModelConfig,
)
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.recipes.generation_mesh import shardings_for_generation
from research.scaling.collectives import Collective, collectives
from research.scaling.hlo import parse_module
from tests.models.variants import VARIANTS
from tests.tiny import abstract_params, random_params, stack, tiny_config

BYTES = ByteTokenizer()
VOCAB = 264
PROMPTS = ["ab", "a longer prompt", "", "xyz"]
# Greedy and drawn, by different rules.
DRAWN = [
    SamplingConfig(max_tokens=6, temperature=0.0),
    SamplingConfig(max_tokens=9, temperature=1.0, seed=1),
    SamplingConfig(max_tokens=9, temperature=0.7, top_k=5, seed=2**40),
    SamplingConfig(max_tokens=9, temperature=1.5, top_p=0.8, repetition_penalty=1.3, seed=3),
]
BEAMS = BeamConfig(num_beams=3, max_tokens=5, num_return=2)

# Grouped queries, a sliding window in every other layer.
DENSE = tiny_config(
    vocab_size=VOCAB,
    attention={"num_heads": 8, "num_kv_heads": 4},
    pattern=(
        LayerConfig(window=3),
        LayerConfig(),
    ),
)
# Latents and experts, a shared one among them, as in DeepSeek-V3.
EXPERTS = tiny_config(
    vocab_size=VOCAB,
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
        VARIANTS["encoder-decoder"], vocab_size=VOCAB, decoder_start_id=3, encoder_layers=1
    ),
}


@functools.lru_cache
def model(name: str) -> tuple[ModelConfig, Any]:
    return MODELS[name], random_params(MODELS[name], seed=3)


def mesh_of(**sizes: int) -> Mesh:
    return make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: math.prod(sizes.values())])


def on_mesh(config: ModelConfig, params: Any, mesh: Mesh) -> Any:
    return jax.device_put(params, shardings_for_generation(abstract_params(config), mesh, 3))


def placed(name: str, sizes: dict[str, int] | None) -> tuple[ModelConfig, Any, Any]:
    """A model, its parameters, and the context to run it in; without sizes on one device."""
    config, params = model(name)
    if sizes is None:
        return config, params, contextlib.nullcontext()
    mesh = mesh_of(**sizes)
    return config, on_mesh(config, params, mesh), jax.set_mesh(mesh)


def drawn(name: str, rows: int, sizes: dict[str, int] | None, cache: str) -> list[tuple[int, ...]]:
    config, params, context = placed(name, sizes)
    with context:
        found = generate(config, params, BYTES, PROMPTS[:rows], DRAWN[:rows], cache=cache)
    return [text.tokens for text in found]


def searched(
    name: str, rows: int, sizes: dict[str, int] | None
) -> tuple[list[Any], np.ndarray, np.ndarray]:
    """The tokens and the scores of all beams, and the logits of the prefill."""
    config, params, context = placed(name, sizes)
    with context:
        found = beam_generate(config, params, BYTES, PROMPTS[:rows], BEAMS)
        prompts, slots = encode(config, BYTES, PROMPTS[:rows], [BEAMS.max_tokens] * rows)
        logits, _ = prefill(params, prompts, config=config, slots=slots)
    tokens = [[beam.tokens for beam in best] for best in found]
    return tokens, np.array([[beam.score for beam in best] for best in found]), np.asarray(logits)


drawn_alone = functools.lru_cache(functools.partial(drawn, sizes=None))
searched_alone = functools.lru_cache(functools.partial(searched, sizes=None))

# A model, prompts, and sizes of axes: four prompts are sharded, three are on all devices.
CASES = {
    "dense, data 2, tensor 2": ("dense", 4, {"data": 2, "tensor": 2}),
    "dense, tensor 4": ("dense", 4, {"tensor": 4}),
    "dense, fsdp 4": ("dense", 4, {"fsdp": 4}),
    "dense, 3 prompts on data 2": ("dense", 3, {"data": 2}),
    "experts, expert 4": ("experts", 4, {"expert": 4}),
    "experts, 4 prompts on data 2, expert 4": ("experts", 4, {"data": 2, "expert": 4}),
    "encoder-decoder, data 2, tensor 2": ("encoder-decoder", 4, {"data": 2, "tensor": 2}),
}


@pytest.mark.fast_cases("dense, data 2, tensor 2")
@pytest.mark.parametrize(("name", "rows", "sizes"), CASES.values(), ids=CASES)
def test_drawn_tokens_are_those_of_one_device(name: str, rows: int, sizes: dict[str, int]):
    assert drawn(name, rows, sizes, "dense") == drawn_alone(name, rows, cache="dense")


@pytest.mark.thorough
def test_pages_on_a_mesh_give_the_tokens_of_rows_on_one_device():
    found = drawn("dense", 4, {"data": 2, "tensor": 2}, "paged")
    assert found == drawn_alone("dense", 4, cache="dense")


def test_tokens_tell_draws_and_prompts_apart():  # the control
    config, params = model("dense")
    others = [dataclasses.replace(each, seed=each.seed + 9) for each in DRAWN]
    found = [text.tokens for text in generate(config, params, BYTES, PROMPTS, others)]
    greedy, *rest = drawn_alone("dense", 4, cache="dense")
    assert found[0] == greedy
    assert all(ours != theirs for ours, theirs in zip(found[1:], rest, strict=True))
    assert len({greedy[:6], *(tokens[:6] for tokens in rest)}) == 4


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "rows", "sizes"),
    [
        ("dense", 4, {"data": 2, "tensor": 2}),
        # Neither three prompts nor their nine beams are a multiple of two.
        ("experts", 3, {"expert": 2, "tensor": 2}),
        ("encoder-decoder", 4, {"data": 2, "tensor": 2}),
    ],
    ids=["dense", "experts", "encoder-decoder"],
)
def test_beams_and_logits_are_those_of_one_device(name: str, rows: int, sizes: dict[str, int]):
    tokens, scores, logits = searched(name, rows, sizes)
    expected_tokens, expected_scores, expected_logits = searched_alone(name, rows)
    assert tokens == expected_tokens
    np.testing.assert_allclose(scores, expected_scores, atol=1e-5)
    np.testing.assert_allclose(logits, expected_logits, atol=1e-5)


# No other axis has this size.
SLOTS = 72
MOVES = ("all-gather", "all-to-all", "collective-permute", "ragged-all-to-all")


def compiled_step(
    config: ModelConfig, params: Any, mesh: Mesh
) -> tuple[DecodeState, str, list[Collective]]:
    """What a decode step of four rows takes, its compiled text, and what it exchanges."""
    with jax.set_mesh(mesh):
        prompts, _ = encode(config, BYTES, PROMPTS, [1] * len(PROMPTS))
        rules, keys = SamplingParams.of(DRAWN), keys_of(range(len(PROMPTS)))
        state = prefill_step(params, prompts, keys, rules, config=config, slots=SLOTS)
        leaves, tree = jax.tree.flatten(state)

        def step(params: Any, leaves: list[jax.Array]) -> list[jax.Array]:
            after = decode_step.__wrapped__(params, tree.unflatten(leaves), config=config)
            return jax.tree.leaves(after)

        # As leaves, for `lower` makes trees of what is no array, which checked shapes refuse.
        compiled = jax.jit(step, donate_argnums=1).lower(params, leaves).compile()
        text = compiled.as_text()
    return state, text, [each for each in collectives(text, mesh) if each.axes]


def bytes_on_a_device(cache: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(cache))


def bytes_on_all(cache: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(cache))


def largest_array_of_slots(text: str) -> int:
    """Elements of the largest array of a device that has the slots as an axis."""
    computations = parse_module(text).computations.values()
    instructions = [each for computation in computations for each in computation.instructions]
    shapes = [shape for each in instructions for shape in each.shapes]
    return max(shape.size for shape in shapes if SLOTS in shape.dims)


def moved(found: list[Collective]) -> set[tuple[str, tuple[str, ...], int]]:
    """Kind, axes and elements of what goes to other devices without a sum."""
    return {
        (each.kind, each.axes, shape.size)
        for each in found
        for shape in each.shapes
        if each.kind in MOVES
    }


def summed(found: list[Collective]) -> set[tuple[tuple[str, ...], int]]:
    """Axes and elements of what is added up over devices."""
    return {
        (each.axes, shape.size) for each in found for shape in each.shapes if each.kind not in MOVES
    }


@pytest.fixture(scope="module")
def stacked() -> tuple[ModelConfig, Any]:
    """The dense model with layers that are scanned, as on TPU and GPU."""
    params = stack(random_params(DENSE), DENSE.num_layers)
    return dataclasses.replace(DENSE, layer_loop="scan"), params


def test_decode_step_gathers_no_cache_and_no_weight(stacked):
    config, params = stacked
    mesh = mesh_of(data=2, tensor=2)
    state, text, found = compiled_step(config, on_mesh(config, params, mesh), mesh)
    [layers] = state.cache.layers
    assert bytes_on_a_device(layers) == bytes_on_all(layers) // 4
    assert largest_array_of_slots(text) == layers.tokens.key.size // 4
    # Of two rows: their logits, the hidden states of each sublayer and of the embedding, and
    # whether any row draws, and by which rules.
    assert moved(found) == {("all-gather", ("tensor",), 2 * VOCAB)}
    assert summed(found) == {(("tensor",), 2 * config.embed_dim), (("data",), 1)}


def test_cache_that_every_device_has_is_found(stacked, monkeypatch):  # the control
    config, params = stacked
    monkeypatch.setattr(caches, "HEADS", (None, None, None, None))
    decode_step.clear_cache()
    prefill_step.clear_cache()
    prefill.clear_cache()
    mesh = mesh_of(data=2, tensor=2)
    state, text, found = compiled_step(config, on_mesh(config, params, mesh), mesh)
    [layers] = state.cache.layers
    assert bytes_on_a_device(layers) == bytes_on_all(layers)
    assert largest_array_of_slots(text) == layers.tokens.key.size
    assert moved(found) > {("all-gather", ("tensor",), 2 * VOCAB)}


@pytest.mark.thorough
def test_latents_are_sharded_over_prompts_and_experts_stay_where_they_are():
    config, params = model("experts")
    mesh = mesh_of(expert=4, tensor=2)
    state, _, found = compiled_step(config, on_mesh(config, params, mesh), mesh)
    assert bytes_on_a_device(state.cache.layers) == bytes_on_all(state.cache.layers) // 4
    # One row of a device: its logits; its hidden states for each choice, to the experts and back,
    # and how many choices each device sends to each expert.
    choices = config.experts.experts_per_token
    assert moved(found) == {
        ("all-gather", ("tensor",), VOCAB),
        ("all-to-all", ("expert",), choices * config.embed_dim),
        ("all-gather", ("expert",), 4 * config.experts.num_experts),
    }
    assert {size for axes, size in summed(found) if "tensor" in axes} == {config.embed_dim}


@pytest.mark.thorough
def test_fsdp_gathers_one_layer_at_a_time(stacked):
    config, params = stacked
    mesh = mesh_of(fsdp=4)
    _, _, found = compiled_step(config, on_mesh(config, params, mesh), mesh)
    kernels = [leaf[0].size for leaf in jax.tree.leaves(params["layers"])]
    tables = [params["embed"]["embedding"].size, params["unembed"].size]
    largest = max(size for _, _, size in moved(found))
    assert largest == max(*kernels, *tables)
    inside = [each for each in found if "while" in each.op_name]
    assert {size for _, _, size in moved(inside)} == {*kernels, config.embed_dim}


@pytest.mark.thorough
def test_beams_of_a_prompt_stay_on_their_devices(stacked):
    config, params = stacked
    mesh = mesh_of(data=2, tensor=2)
    params = on_mesh(config, params, mesh)
    rows, beams = len(PROMPTS), BEAMS.num_beams
    with jax.set_mesh(mesh):
        prompts, _ = encode(config, BYTES, PROMPTS, [1] * rows)
        _, filled = prefill(params, prompts, config=config, slots=SLOTS)

        taken = filled.take(jnp.repeat(jnp.arange(rows), beams))
        first = beams * jnp.arange(rows)[:, None]
        order = first + jnp.asarray([[2, 0, 0], [0, 0, 0], [1, 1, 2], [0, 2, 1]])
        leaves, tree = jax.tree.flatten(taken)

        @jax.jit
        def reorder(leaves: list[jax.Array], order: jax.Array) -> list[jax.Array]:
            return jax.tree.leaves(tree.unflatten(leaves).reorder(order))

        compiled = reorder.lower(leaves, order).compile()
        assert not [each for each in collectives(compiled.as_text(), mesh) if each.axes]
        for before, after in zip(leaves, compiled(leaves, order), strict=True):
            wanted = np.asarray(before)[:, np.asarray(order).reshape(-1)]
            np.testing.assert_array_equal(after, wanted)


def test_one_compilation_serves_all_steps_on_a_mesh(stacked, caplog):
    config, params = stacked
    mesh = mesh_of(data=2, tensor=2)
    params = on_mesh(config, params, mesh)
    decode_step.clear_cache()
    beam_step.clear_cache()
    with jax.set_mesh(mesh), jax.log_compiles(), caplog.at_level(logging.WARNING):
        generate(config, params, BYTES, PROMPTS, DRAWN)
        beam_generate(config, params, BYTES, PROMPTS, BEAMS)
    for step in ("decode_step", "beam_step"):
        assert caplog.text.count(f"Compiling jit({step})") == 1

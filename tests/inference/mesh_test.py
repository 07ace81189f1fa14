"""A mesh changes where a model and its pages lie, and no token: those of one device in float32."""

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

from research.bench.engine_steps import CompiledRead, compile_read, on_device
from research.core.errors import UserError
from research.data.tokenizers.byte import ByteTokenizer
from research.inference.answers import Answer
from research.inference.beam_config import BeamConfig
from research.inference.engine import Engine
from research.inference.grammar_config import GrammarConfig
from research.inference.prompts import encode_ids
from research.inference.requests import Request
from research.inference.runner import Runner
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.inference.slots import LogprobKind
from research.models.cache_rows import put_layer, slice_layer
from research.models.config import (
    ExpertsConfig,
    LatentConfig,
    LayerConfig,
    ModelConfig,
)
from research.models.paged_cache import PagedCache
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.recipes.generation_mesh import shardings_for_generation
from tests.inference.compiled_read import largest_array_of_pages, moved, summed
from tests.models.variants import VARIANTS
from tests.tiny import abstract_params, random_params, stack, tiny_config

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


def test_tokens_tell_draws_and_prompts_apart():  # the control
    config, params = model("dense")
    greedy, *others, _ = requests(config)
    others = [
        dataclasses.replace(each, sampling=dataclasses.replace(each.sampling, seed=99 + index))
        for index, each in enumerate(others)
    ]
    found = Engine(config, params, BYTES, SERVE).run([greedy, *others])
    assert tokens(found[0]) == tokens(alone("dense")[0])
    for ours, theirs in zip(found[1:], alone("dense")[1:], strict=False):
        assert tokens(ours) != tokens(theirs)
    assert len({tokens(answer)[0][:6] for answer in alone("dense")[:4]}) == 4


def bytes_on_a_device(tree: Any) -> int:
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))


def bytes_of_all(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("name", "part"), [("dense", 4), ("experts", 1)])
def test_a_device_of_tensor_4_has_a_quarter_of_keys_and_values_and_all_latents(
    name: str, part: int
):
    state = runners(engine_of(name, {"tensor": 4}))[0].state
    pages = [layer.tokens for layer in state.layers]
    assert bytes_on_a_device(pages) * part == bytes_of_all(pages)


def test_what_an_encoder_read_is_sharded_over_its_heads():
    state = runners(engine_of("encoder-decoder", {"tensor": 2}))[0].state
    memory = [layer.memory for layer in state.layers]
    assert bytes_on_a_device(memory) * 2 == bytes_of_all(memory)


def test_replicas_share_requests_and_no_device():
    engine = engine_of("dense", {"data": 2, "tensor": 2})
    first, second = runners(engine)
    answered = engine.submit_all(requests(DENSE))
    engine.run_step()
    engine.run_step()
    # Both have written pages beside page 0, which is nobody's.
    for runner in (first, second):
        assert np.asarray(runner.state.layers[0].tokens.pages.key)[1:].any()
    assert not devices(first.state) & devices(second.state)
    assert not any(answer.finished for answer in answered)


def runners(engine: Engine) -> list[Runner]:
    return [replica._runner for replica in engine.replicas]


def devices(tree: Any) -> set[jax.Device]:
    return {device for leaf in jax.tree.leaves(tree) for device in leaf.devices()}


TILE = 8
# Of these every layer has pages above whatever else a step needs.
SIZES = {"slots": 4, "tokens": 2048, "tile": TILE}


def compiled(name: str, sizes: dict[str, int], *, is_scanned: bool) -> CompiledRead:
    """A step of a model, as on TPU and GPU with scanned layers, or as on CPU."""
    config, params = model(name)
    if is_scanned:
        # Two rounds of the pattern: a single one would be no loop.
        assert not config.first_layers
        num_layers = 2 * len(config.pattern)
        config = dataclasses.replace(config, num_layers=num_layers)
        params = stack(random_params(config), num_layers)
        config = dataclasses.replace(config, layer_loop="scan")
    mesh = mesh_of(**sizes)
    return compile_read(config, on_mesh(config, params, mesh), mesh, **SIZES)


@pytest.mark.fast_cases("scanned")
@pytest.mark.parametrize("is_scanned", [True, False], ids=["scanned", "unrolled"])
def test_a_step_gathers_no_page_and_no_weight(is_scanned: bool):
    found = compiled("dense", {"tensor": 2}, is_scanned=is_scanned)
    parts = [math.prod(on_device(leaf)) for leaf in found.pages]
    assert parts == [leaf.size // 2 for leaf in found.pages]
    assert largest_array_of_pages(found) == max(parts)
    # Logits; hidden states of each sublayer and of the embedding.
    assert moved(found) == {("all-gather", ("tensor",), TILE * VOCAB)}
    assert summed(found) == {(("tensor",), TILE * DENSE.embed_dim)}
    assert found.temporaries < found.layer_bytes


def test_pages_that_every_device_has_are_found(monkeypatch):  # the control
    monkeypatch.setattr(PagedCache, "lay_out", lambda cache: cache)
    found = compiled("dense", {"tensor": 2}, is_scanned=True)
    assert largest_array_of_pages(found) == max(leaf.size for leaf in found.pages)


def test_pages_that_are_scanned_over_are_found(monkeypatch):  # the control
    def copied(cache: PagedCache, index: jax.Array) -> PagedCache:
        # As a scan hands a layer to its body, and takes it back.
        return cache.replace(pages=slice_layer(cache.pages, index))

    def put(cache: PagedCache, index: jax.Array, layer: PagedCache) -> PagedCache:
        return cache.replace(pages=put_layer(cache.pages, index, layer.pages))

    monkeypatch.setattr(PagedCache, "layer", copied)
    monkeypatch.setattr(PagedCache, "put", put)
    found = compiled("dense", {"tensor": 2}, is_scanned=True)
    assert found.temporaries > found.layer_bytes


@pytest.mark.thorough
def test_experts_are_sent_no_rows_and_latents_stay():
    found = compiled("experts", {"expert": 4, "tensor": 2}, is_scanned=False)
    assert largest_array_of_pages(found) == max(leaf.size for leaf in found.pages)
    assert moved(found) == {("all-gather", ("tensor",), TILE * VOCAB)}
    # All devices have all rows: the experts' outputs are added up over both axes.
    hidden = TILE * EXPERTS.embed_dim
    assert summed(found) == {(("tensor",), hidden), (("expert", "tensor"), hidden)}
    assert found.temporaries < found.layer_bytes


@pytest.mark.thorough
def test_fsdp_sends_hidden_states_and_no_weight():
    found = compiled("dense", {"fsdp": 4}, is_scanned=False)
    assert moved(found) == {("all-gather", ("fsdp",), TILE * DENSE.embed_dim)}
    c = DENSE.attention
    widths = {c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, DENSE.mlp.hidden_dim, VOCAB}
    assert summed(found) == {(("fsdp",), TILE * width) for width in widths}


def test_parameters_on_no_mesh_are_refused_with_one():
    params = jax.tree.map(np.asarray, model("dense")[1])
    with pytest.raises(UserError, match=r"^params: .* is on no mesh\."):
        Engine(DENSE, params, BYTES, SERVE, mesh_of(tensor=2))


def test_nothing_is_compiled_after_the_start(caplog):
    engine = engine_of("dense", {"data": 2, "tensor": 2})
    asked = requests(DENSE)
    # One for each replica, with options that the others do not have.
    options = {"prompt_logprobs": 2, "logprob_kind": LogprobKind.PROCESSED, "kept": True}
    chosen = GrammarConfig(choices=("yes", "no"))
    asked += [Request(asked[0].ids, DRAWN[3], grammar=chosen, **options)] * 2
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x + 1)(jnp.zeros(3))
        before = caplog.text.count("Compiling jit")
        assert before  # the control
        engine.run(asked)
        engine.update_params(jax.tree.map(np.asarray, random_params(DENSE, seed=4)))
        found = engine.run(asked)
    assert caplog.text.count("Compiling jit") == before
    others = Engine(DENSE, random_params(DENSE, seed=4), BYTES, SERVE).run(asked)
    assert [tokens(answer) for answer in found] == [tokens(answer) for answer in others]

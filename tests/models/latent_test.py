"""Latent attention with a cache: few queries go to the latents, and get what heads with keys and
values give them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data.tokenizers.byte import ByteTokenizer
from research.inference.generate import generate
from research.inference.sampling_config import SamplingConfig
from research.models import latent
from research.models.cache import Cache, empty_cache
from research.models.config import AttentionConfig, LatentConfig, LayerConfig, ModelConfig
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.parallel.rules import param_shardings
from tests.models.cache_test import LENGTHS, TOTAL, read, read_by_token
from tests.models.variants_test import scanned
from tests.tiny import abstract_params, logits, random_params, random_tokens, tiny_config

NARROW = LatentConfig(kv_dim=6, q_dim=10, rope_dim=4, value_dim=5)
WIDE = LatentConfig(kv_dim=7, q_dim=None, rope_dim=2, value_dim=9)


def model(
    sizes: LatentConfig = NARROW, attention: dict[str, Any] | None = None, **changes: Any
) -> ModelConfig:
    return tiny_config(
        attention={"num_kv_heads": 4, "latent": sizes} | (attention or {}), **changes
    )


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Selects weight absorption or decompressed MLA for all that is traced afterwards."""

    def take(weight_absorption: bool) -> None:
        jax.clear_caches()
        monkeypatch.setattr(latent, "uses_weight_absorption", lambda *_: weight_absorption)

    yield take
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize(
    ("queries", "slots", "expected"),
    [
        (1, 1, False),
        (1, 2, True),
        (1, 4096, True),
        (4, 4096, True),
        (5, 4096, False),
        (4, 4, False),
        (64, 128, False),
    ],
)
def test_weight_absorption_is_used_for_few_queries_of_many_slots(
    queries: int, slots: int, expected: bool
):
    sizes = LatentConfig(
        kv_dim=512, q_dim=1536, rope_dim=64, value_dim=128
    )  # DeepSeek-V3, whose cache holds 576
    config = AttentionConfig(num_heads=128, num_kv_heads=128, head_dim=128, latent=sizes)
    assert latent.uses_weight_absorption(config, queries, slots) is expected


CASES = {
    "scale": model(attention={"scale": 0.7}),
    "direct queries": model(WIDE),
    "windows, soft cap": model(
        attention={"softcap": 2.0}, pattern=(LayerConfig(window=4), LayerConfig())
    ),
}


@pytest.mark.fast_cases("windows, soft cap-scan")
@pytest.mark.parametrize(
    ("name", "loop"), [*((name, "unroll") for name in CASES), ("windows, soft cap", "scan")]
)
def test_prompts_of_mixed_lengths_go_on_as_in_training(
    name: str, loop: str, forms: Callable[[bool], None], monkeypatch: pytest.MonkeyPatch
):
    config, choose, taken = CASES[name], latent.uses_weight_absorption, []
    params, tokens = random_params(config), random_tokens(len(LENGTHS), TOTAL)
    expected = np.asarray(logits(config, params, tokens))
    if loop == "scan":
        config, params = scanned(config, params)

    def note(*arguments: Any) -> bool:
        taken.append((arguments[1], choose(*arguments)))
        return taken[-1][1]

    monkeypatch.setattr(latent, "uses_weight_absorption", note)
    found = read_by_token(config, params, tokens)
    for row, length in enumerate(LENGTHS + TOTAL - LENGTHS.max()):
        np.testing.assert_allclose(
            found[row], expected[row, :length], atol=1e-5 * np.abs(expected).max()
        )
    assert set(taken) == {(10, False), (1, True)}  # the prompts, and the tokens after them


def test_several_new_tokens_give_what_heads_give(forms: Callable[[bool], None]):
    config = model(WIDE, attention={"softcap": 2.0}, pattern=(LayerConfig(window=4),))
    params, tokens = random_params(config), random_tokens(2, 9)
    positions = np.tile(np.arange(9), (2, 1))
    found = []
    for weight_absorption in (False, True):
        forms(weight_absorption)
        _, cache = read(
            config,
            params,
            tokens[:, :6],
            positions[:, :6],
            empty_cache(config, 2, 12, stacked=False),
        )
        found.append(read(config, params, tokens[:, 6:], positions[:, 6:], cache)[0])
    np.testing.assert_allclose(found[1], found[0], atol=1e-5 * np.abs(found[0]).max())


def test_greedy_text_is_that_of_heads(forms: Callable[[bool], None]):
    tokenizer = ByteTokenizer()
    config = model(vocab_size=tokenizer.vocab_size)
    params = random_params(config)
    texts = []
    for weight_absorption in (False, True):
        forms(weight_absorption)
        sampling = SamplingConfig(temperature=0.0, max_tokens=24)
        texts.append(
            [
                one.tokens
                for one in generate(config, params, tokenizer, ["abc", "a longer one"], sampling)
            ]
        )
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 2


def test_a_mesh_gives_the_step_of_one_device():
    config = model()
    params, tokens = random_params(config), random_tokens(4, 6)
    positions = np.tile(np.arange(6), (4, 1))

    def prompt_and_step(params: Any) -> tuple[jax.Array, Cache]:
        _, cache = read(
            config,
            params,
            tokens[:, :5],
            positions[:, :5],
            empty_cache(config, 4, 12, stacked=False),
        )
        return read(config, params, tokens[:, 5:], positions[:, 5:], cache)

    expected = prompt_and_step(params)
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        found = prompt_and_step(
            jax.device_put(params, param_shardings(abstract_params(config), mesh))
        )
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, atol=1e-5 * np.abs(other).max())
    assert len(found[0].sharding.device_set) == 8


def test_a_step_projects_no_slots_to_heads(forms: Callable[[bool], None]):
    sizes = dataclasses.replace(NARROW, kv_dim=32)
    config, slots = model(sizes, num_layers=1), 64
    c = config.attention
    flops = {}
    for weight_absorption in (False, True):
        forms(weight_absorption)
        one, cache = jnp.zeros((1, 1), jnp.int32), empty_cache(config, 1, slots, stacked=False)
        step = jax.jit(
            lambda params, one=one, cache=cache: read(config, params, one, one, cache)[0]
        )
        flops[weight_absorption] = step.lower(random_params(config)).cost_analysis()["flops"]
    projected = 2 * slots * sizes.kv_dim * c.num_heads * (c.head_dim + sizes.value_dim)
    assert flops[False] > projected
    assert flops[True] < 0.5 * projected

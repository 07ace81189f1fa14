"""What holds for every variant: packing, scanned layers, caches, gradients for all parameters."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.trees import named_leaves
from research.models.cache import Cache, empty_cache
from research.models.canonical_params import canonical, unstack_layers
from research.models.config import HeadConfig, LatentConfig, LayerConfig, ModelConfig
from research.models.transformer import Transformer
from research.training.language_model import LanguageModelLoss
from tests.models.variants import VARIANTS, pack, rows, unpacked
from tests.tiny import abstract_params, random_params, summed, tiny_config

LENGTHS = [9, 5, 7]


@functools.partial(jax.jit, static_argnums=0)
def logits(config: ModelConfig, params: Any, inputs: dict[str, Any]) -> jax.Array:
    def apply(module: Transformer) -> jax.Array:
        return module.logits(module(inputs).hidden)

    return Transformer(config).apply({"params": params}, method=apply)


def scanned(config: ModelConfig, params: Any) -> tuple[ModelConfig, Any]:
    """The same model with its layers in a loop."""
    config = dataclasses.replace(config, layer_loop="scan")
    like = named_leaves(_unboxed(config))
    held = unstack_layers(canonical(jax.tree.map(jnp.asarray, params)), like)
    return config, jax.tree.unflatten(
        jax.tree.structure(_unboxed(config)), [held[name] for name in like]
    )


def _unboxed(config: ModelConfig) -> Any:
    return nn.unbox(abstract_params(config))


@pytest.mark.fast_cases("windows", "shared experts", "latent", "encoder", "encoder-decoder")
@pytest.mark.parametrize("name", VARIANTS)
def test_packed_documents_give_what_they_give_alone(name: str):
    config = VARIANTS[name]
    params, documents = random_params(config), rows(config, LENGTHS)
    packed = np.asarray(logits(config, params, pack(documents)))[0]
    apart = np.asarray(logits(config, params, unpacked(documents)))
    alone = np.concatenate([row[:length] for row, length in zip(apart, LENGTHS, strict=True)])
    np.testing.assert_allclose(packed[: len(alone)], alone, atol=1e-5 * np.abs(alone).max())
    assert np.abs(alone).max() > 0.1


@pytest.mark.fast_cases("shared experts", "encoder-decoder")
@pytest.mark.parametrize("name", VARIANTS)
def test_scanned_layers_give_the_same(name: str):
    config = VARIANTS[name]
    params, inputs = random_params(config), pack(rows(config, LENGTHS))
    expected = logits(config, params, inputs)
    found = logits(*scanned(config, params), inputs)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@functools.partial(jax.jit, static_argnums=0)
def read(
    config: ModelConfig, params: Any, inputs: dict[str, Any], cache: Cache
) -> tuple[jax.Array, Cache]:
    def apply(module: Transformer) -> tuple[jax.Array, Cache]:
        output = module(inputs, cache)
        return module.logits(output.hidden), output.cache

    return Transformer(config).apply({"params": params}, method=apply)


LOOPS = ["windows", "first layers", "latent", "shared experts", "buckets", "encoder-decoder"]


@pytest.mark.fast_cases(
    "windows-unroll", "latent-scan", "shared experts-unroll", "encoder-decoder-unroll"
)
@pytest.mark.parametrize(
    ("name", "loop"),
    [(name, "unroll") for name, config in VARIANTS.items() if config.structure != "encoder"]
    + [(name, "scan") for name in LOOPS],
)
def test_cached_steps_give_the_training_logits(name: str, loop: str):
    config = VARIANTS[name]
    params, (document,) = random_params(config), rows(config, [9])
    expected = np.asarray(logits(config, params, document))[0]
    if loop == "scan":
        config, params = scanned(config, params)
    memory = jnp.ones_like(document["encoder_tokens"]) if "encoder_tokens" in document else None
    cache = empty_cache(config, 1, 12, loop == "scan", memory)
    prompt = {
        key: array if key.startswith("encoder") else array[:, :6] for key, array in document.items()
    }
    first, cache = read(config, params, prompt, cache)
    found = list(np.asarray(first)[0])
    later = ("tokens", "positions", "types")  # the encoder and the prefix are in the cache
    for position in range(6, 9):
        step = {key: document[key][:, position : position + 1] for key in later if key in document}
        new, cache = read(config, params, step, cache)
        found.append(np.asarray(new)[0, 0])
    # RoPE scaling rules that depend on a document's length rotate its earlier keys differently once
    # it is longer than the original length.
    by_length = config.position.scaling is not None and config.position.scaling.by_length
    end = 6 if by_length else 9
    if by_length:
        expected = np.asarray(logits(config, params, prompt))[0]
    np.testing.assert_allclose(found[:end], expected[:end], atol=1e-5 * np.abs(expected).max())


def changed(config: ModelConfig, inputs: dict[str, Any], name: str, position: int) -> list[int]:
    """The positions whose logits change when one token does."""
    params = random_params(config)
    other = {key: np.array(array) for key, array in inputs.items()}
    other[name][0, position] = (other[name][0, position] + 1) % config.vocab_size
    difference = np.abs(logits(config, params, inputs) - logits(config, params, other))[0].max(
        axis=-1
    )
    return np.flatnonzero(difference > 1e-7).tolist()


def test_a_decoder_attends_to_earlier_tokens_only():
    config = VARIANTS["sinks"]
    (document,) = rows(config, [10])
    assert changed(config, document, "tokens", 4) == list(range(4, 10))


def test_an_encoder_attends_to_all_tokens():
    config = VARIANTS["encoder"]
    (document,) = rows(config, [10])
    for position in (0, 4, 9):
        assert changed(config, document, "tokens", position) == list(range(10))


@pytest.mark.parametrize(
    ("structure", "seen"), [("decoder", range(6, 9)), ("encoder", range(4, 9))]
)
def test_a_window_hides_what_is_as_far_as_it_is_wide(structure: str, seen: range):
    config = tiny_config(num_layers=1, structure=structure, pattern=(LayerConfig(window=3),))
    (document,) = rows(config, [12])
    assert changed(config, document, "tokens", 6) == list(seen)


def test_layers_with_windows_add_up_their_windows():
    two = tiny_config(num_layers=2, pattern=(LayerConfig(window=3),))
    (document,) = rows(two, [12])
    assert changed(two, document, "tokens", 3) == list(range(3, 8))
    one_global = tiny_config(num_layers=2, pattern=(LayerConfig(window=3), LayerConfig()))
    assert changed(one_global, document, "tokens", 3) == list(range(3, 12))


@pytest.mark.parametrize("name", ["prefix", "prefix in a packed row"])
def test_attention_within_a_prefix_is_bidirectional(name: str):
    config = VARIANTS["prefix"]
    documents = rows(config, [8, 8])  # of each, four tokens are the prefix
    start, inputs = (0, documents[0]) if name == "prefix" else (8, pack(documents))
    assert changed(config, inputs, "tokens", start + 2) == list(range(start, start + 8))
    assert changed(config, inputs, "tokens", start + 5) == list(range(start + 5, start + 8))


def test_a_decoder_attends_to_all_encoder_tokens_of_its_own_document():
    config = VARIANTS["encoder-decoder"]
    inputs = pack(rows(config, [5, 6]))  # their encoders read seven and eight tokens
    assert changed(config, inputs, "encoder_tokens", 1) == list(range(5))
    assert changed(config, inputs, "encoder_tokens", 9) == list(range(5, 11))
    assert changed(config, inputs, "tokens", 7) == list(range(7, 11))


@pytest.mark.fast_cases("windows", "latent", "encoder-decoder")
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "multi-token prediction"])
def test_every_parameter_has_a_gradient(name: str):
    config = VARIANTS[name]
    params, inputs = random_params(config), pack(rows(config, LENGTHS))
    targets = jnp.roll(inputs["tokens"], -1, axis=1)
    weights = (inputs["segments"] != 0).astype(jnp.float32)
    batch = {**inputs, "targets": targets, "weights": weights}
    gradients = jax.jit(
        jax.grad(lambda params: summed(LanguageModelLoss(config))(params, batch, None)[0])
    )(params)
    still = {name for name, leaf in named_leaves(gradients).items() if not np.abs(leaf).max() > 0}
    # The pooler is not part of the loss of a language model, and the selection bias is set by rule.
    assert {
        each for each in still if not each.startswith("pooler/") and "selection_bias" not in each
    } == set()


@pytest.mark.thorough
def test_dropout_reaches_both_stacks_of_an_encoder_decoder():
    config = dataclasses.replace(VARIANTS["encoder-decoder"], dropout=0.5)
    document, params = pack(rows(config, [9]), padding=0), random_params(config)

    @jax.jit
    def states(params: Any, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        def apply(module: Transformer) -> tuple[jax.Array, jax.Array]:
            whole = module(document, deterministic=key is None).hidden
            return module.encode(document, key=key)[0], whole

        return Transformer(config).apply(
            {"params": params}, rngs={} if key is None else {"dropout": key}, method=apply
        )

    plain, one, other = (
        states(params, key) for key in (None, jax.random.key(1), jax.random.key(2))
    )
    for without, first, second in zip(plain, one, other, strict=True):
        assert np.abs(first - without).max() > 0.1
        assert np.abs(first - second).max() > 0.1


def test_only_real_tokens_of_the_encoder_are_attended_to_whatever_their_number():
    config = VARIANTS["encoder-decoder"]
    (document,), params = rows(config, [5]), random_params(config)
    expected = logits(config, params, document)
    seven = jnp.full_like(document["encoder_tokens"], 7)
    np.testing.assert_allclose(
        logits(config, params, document | {"encoder_segments": seven}), expected, atol=1e-5
    )


_LATENT = LatentConfig(kv_dim=6, q_dim=10, rope_dim=4, value_dim=5)


def test_attention_within_a_cached_prefix_of_latents_is_bidirectional():
    config = tiny_config(structure="prefix", attention={"num_kv_heads": 4, "latent": _LATENT})
    (document,), params = rows(config, [8]), random_params(config)
    expected = logits(config, params, document)
    found, _ = read(config, params, document, empty_cache(config, 1, 12, stacked=False))
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_cross_attention_beside_latents_has_a_cache_of_its_own_shape():
    latents = {"num_kv_heads": 4, "latent": _LATENT}
    config = tiny_config(structure="encoder_decoder", encoder_layers=1, attention=latents)
    (document,), params = rows(config, [8]), random_params(config)
    empty = empty_cache(
        config, 1, 12, stacked=False, memory_segments=jnp.ones_like(document["encoder_tokens"])
    )
    found, cache = read(config, params, document, empty)
    np.testing.assert_allclose(found, logits(config, params, document), atol=1e-5)
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == [
        leaf.shape for leaf in jax.tree.leaves(empty)
    ]


def test_tokens_further_on_are_predicted_with_the_positions_of_the_model():
    config = dataclasses.replace(VARIANTS["buckets"], head=HeadConfig(mtp_depth=1))
    document, params = pack(rows(config, [9]), padding=0), random_params(config)

    @jax.jit
    def predicted(params: Any) -> jax.Array:
        def apply(module: Transformer) -> jax.Array:
            hidden = jnp.ones((1, 9, config.embed_dim)) * jnp.arange(9.0)[None, :, None]
            return module.mtp_hidden(hidden, [document["tokens"]], document["positions"], None)[0][
                0
            ]

        return Transformer(config).apply({"params": params}, method=apply)

    other = params | {"position_bias": jax.tree.map(lambda leaf: -leaf, params["position_bias"])}
    assert np.abs(predicted(params) - predicted(other)).max() > 0.01
    by_length = dataclasses.replace(VARIANTS["longrope"], head=HeadConfig(mtp_depth=1))
    inputs = pack(rows(by_length, [9, 5]))
    batch = {**inputs, "targets": inputs["tokens"], "weights": jnp.ones(inputs["tokens"].shape)}
    loss = jax.jit(lambda params: summed(LanguageModelLoss(by_length))(params, batch, None)[0])
    assert np.isfinite(loss(random_params(by_length)))


def test_predictors_of_tokens_further_on_drop_what_blocks_drop():
    config = dataclasses.replace(VARIANTS["multi-token prediction"], dropout=0.5)
    document, params = pack(rows(config, [9]), padding=0), random_params(config)

    @jax.jit
    def predicted(params: Any, key: jax.Array | None) -> list[jax.Array]:
        def apply(module: Transformer) -> list[jax.Array]:
            hidden, following = jnp.ones((1, 9, config.embed_dim)), [document["tokens"]] * 2
            options = {"deterministic": key is None}
            return module.mtp_hidden(hidden, following, document["positions"], None, **options)[0]

        return Transformer(config).apply(
            {"params": params}, rngs={} if key is None else {"dropout": key}, method=apply
        )

    plain, one, other = (
        predicted(params, key) for key in (None, jax.random.key(1), jax.random.key(2))
    )
    for without, first, second in zip(plain, one, other, strict=True):
        assert np.abs(first - without).max() > 0.1
        assert np.abs(first - second).max() > 0.1


def test_routers_of_an_encoder_are_kept_even_too():
    config = dataclasses.replace(VARIANTS["encoder-decoder"], experts=VARIANTS["experts"].experts)
    document, params = pack(rows(config, [9])), jax.tree.map(jnp.asarray, random_params(config))

    @jax.jit
    def routed(encoder_router: jax.Array) -> jax.Array:
        # The decoder's loss hardly depends on the router of this layer.
        layer = params["encoder"]["layers_2"]
        layer = layer | {"mlp": layer["mlp"] | {"router": {"kernel": encoder_router}}}
        encoder = params["encoder"] | {"layers_2": layer}
        return (
            Transformer(config)
            .apply({"params": params | {"encoder": encoder}}, document)
            .reports.router_loss
        )

    even = jnp.zeros_like(params["encoder"]["layers_2"]["mlp"]["router"]["kernel"])
    # Scores that are all alike have the least z-loss, log(4)², and a steep router has more.
    steep = routed(even + 30 * jnp.arange(4.0)[None])
    assert steep - routed(even) > 0.1

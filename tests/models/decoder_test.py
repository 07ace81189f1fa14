"""Every variant of the decoder is the mathematics that its config says."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from research.core.trees import count, named_leaves
from research.models.config import LayerConfig, ModelConfig, NormConfig, PositionConfig
from research.models.initialization import init_params
from research.models.stack import resolve_layer_loop
from research.models.transformer import Transformer
from tests.models.plain import plain_logits
from tests.tiny import (
    VOCAB,
    abstract_params,
    logits,
    random_params,
    random_tokens,
    stack,
    tiny_config,
)

KINDS = ("none", "learned", "sinusoidal", "rotary", "alibi")
GPT2 = {
    "attention": {"qkv_bias": True, "out_bias": True},
    "mlp": {"activation": "gelu_tanh", "gated": False, "bias": True},
    "norm": NormConfig(kind="layernorm", bias=True),
    "position": PositionConfig(kind="learned"),
    "tied_embeddings": True,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "rotary, rmsnorm, swiglu": {},
    "rotary of another base": {"position": PositionConfig(theta=100.0)},
    "no positions": {"position": PositionConfig(kind="none")},
    "alibi, gelu": {"position": PositionConfig(kind="alibi"), "mlp": {"activation": "gelu"}},
    "sinusoidal, scaled": {"position": PositionConfig(kind="sinusoidal"), "scale_embeddings": True},
    "gpt2": GPT2,
    "post-norm": GPT2 | {"norm": NormConfig(kind="layernorm", bias=True, placement="post")},
    "rmsnorm with bias": {"norm": NormConfig(bias=True, epsilon=0.1)},
    "gated with biases": {
        "mlp": {"activation": "gelu_tanh", "bias": True},
        "attention": {"qkv_bias": True},
    },
    "relu": {"mlp": {"activation": "relu", "gated": False}, "tied_embeddings": True},
}


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(tiny_config())


@pytest.fixture(scope="module")
def packed() -> dict[str, np.ndarray]:
    """One row of two documents, of 7 and 5 tokens, and 2 of padding."""
    return {
        "tokens": random_tokens(1, 14),
        "positions": np.array([[*range(7), *range(5), 0, 0]], np.int32),
        "segments": np.array([[1] * 7 + [2] * 5 + [0] * 2], np.int32),
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_equal_the_plain_mathematics(name: str, packed):
    config = tiny_config(**VARIANTS[name])
    params = random_params(config)
    expected = plain_logits(
        config, params, *(packed[key][0] for key in ("tokens", "positions", "segments"))
    )
    found = logits(config, params, **packed)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found[0], expected, atol=2e-5, rtol=2e-5)


@pytest.mark.default_passes
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_multi_query_and_multi_head_attention_equal_the_plain_mathematics(kv_heads: int, packed):
    config = tiny_config()
    config = dataclasses.replace(
        config, attention=dataclasses.replace(config.attention, num_kv_heads=kv_heads)
    )
    params = random_params(config)
    expected = plain_logits(
        config, params, *(packed[key][0] for key in ("tokens", "positions", "segments"))
    )
    np.testing.assert_allclose(logits(config, params, **packed)[0], expected, atol=2e-5, rtol=2e-5)


def test_parameters_have_the_shapes_of_the_legend():
    shapes = {
        name: leaf.shape
        for name, leaf in named_leaves(nn.unbox(abstract_params(tiny_config(**GPT2)))).items()
    }
    layer = {
        "attention/query/kernel": (16, 4, 4),
        "attention/query/bias": (4, 4),
        "attention/key/kernel": (16, 2, 4),
        "attention/key/bias": (2, 4),
        "attention/value/kernel": (16, 2, 4),
        "attention/value/bias": (2, 4),
        "attention/out/kernel": (4, 4, 16),
        "attention/out/bias": (16,),
        "attention_norm/scale": (16,),
        "attention_norm/bias": (16,),
        "mlp/up/kernel": (16, 24),
        "mlp/up/bias": (24,),
        "mlp/down/kernel": (24, 16),
        "mlp/down/bias": (16,),
        "mlp_norm/scale": (16,),
        "mlp_norm/bias": (16,),
    }
    expected = {f"layers_{i}/{name}": shape for i in range(2) for name, shape in layer.items()}
    expected |= {"embed/embedding": (VOCAB, 16), "position_embed/embedding": (64, 16)}
    expected |= {"final_norm/scale": (16,), "final_norm/bias": (16,)}
    assert shapes == expected


def test_gate_and_untied_output_add_their_parameters():
    plain = tiny_config(mlp={"gated": False}, tied_embeddings=True)
    assert (
        count(abstract_params(tiny_config(mlp={"gated": False}))) - count(abstract_params(plain))
        == 16 * VOCAB
    )
    assert (
        count(abstract_params(tiny_config(tied_embeddings=True))) - count(abstract_params(plain))
        == 2 * 16 * 24
    )


def test_initial_parameters_have_the_configured_deviations_and_differ_by_layer():
    config = tiny_config(embed_dim=64, mlp={"hidden_dim": 256}, init_stddev=0.1, layer_loop="scan")
    boxed = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    assert boxed["layers"]["mlp"]["up"]["kernel"].names == ("layers", "embed", "mlp")
    params = nn.unbox(boxed)
    up, down = (params["layers"]["mlp"][name]["kernel"] for name in ("up", "down"))
    assert up.shape == (2, 64, 256)
    assert np.std(up) == pytest.approx(0.1, rel=0.05)
    assert np.std(down) == pytest.approx(0.1 / 2, rel=0.05)
    assert np.std(params["layers"]["attention"]["out"]["kernel"]) == pytest.approx(
        0.1 / 2, rel=0.05
    )
    assert np.std(params["embed"]["embedding"]) == pytest.approx(0.1, rel=0.05)
    assert (params["final_norm"]["scale"] == 1).all()
    assert abs(np.corrcoef(up[0].ravel(), up[1].ravel())[0, 1]) < 0.05


@pytest.mark.thorough
def test_initial_parameters_are_the_same_scanned_or_unrolled():
    unrolled, scanned = (
        nn.unbox(init_params(tiny_config(layer_loop=loop), jax.random.key(3)))
        for loop in ("unroll", "scan")
    )
    for name, leaf in named_leaves(stack(unrolled, 2)).items():
        np.testing.assert_array_equal(leaf, named_leaves(scanned)[name], err_msg=name)


@pytest.mark.parametrize("name", ["auto", "reference", "cpu"])
def test_every_attention_of_this_platform_takes_packed_rows(name: str, params, packed):
    found = logits(tiny_config(attention={"implementation": name}), params, **packed)
    np.testing.assert_allclose(found, logits(tiny_config(), params, **packed), atol=1e-5)


def test_packed_documents_do_not_attend_to_each_other(params, packed):
    found = logits(tiny_config(), params, **packed)
    for start, stop in ((0, 7), (7, 12)):
        alone = logits(tiny_config(), params, packed["tokens"][:, start:stop])
        np.testing.assert_allclose(found[:, start:stop], alone, atol=1e-5)


def test_packed_documents_leak_without_segments(params, packed):
    leaking = logits(tiny_config(), params, packed["tokens"], packed["positions"])
    alone = logits(tiny_config(), params, packed["tokens"][:, 7:12])
    assert np.abs(leaking[:, 7:12] - alone).max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_a_later_token_changes_nothing_before_it(kind: str):
    config = tiny_config(position=PositionConfig(kind=kind))
    params, tokens = random_params(config), random_tokens(1, 14)
    changed = tokens.copy()
    changed[0, 9] = (tokens[0, 9] + 1) % VOCAB
    before, after = logits(config, params, tokens), logits(config, params, changed)
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert (np.abs(before - after)[0, 9:].max(axis=-1) > 1e-3).all()


@pytest.mark.parametrize("name", ["rotary, rmsnorm, swiglu", "gpt2", "post-norm"])
def test_scanned_layers_equal_unrolled_ones(name: str, packed):
    unrolled = tiny_config(**VARIANTS[name], layer_loop="unroll")
    scanned = dataclasses.replace(unrolled, layer_loop="scan")
    params = random_params(unrolled)
    found = logits(scanned, stack(params, 2), **packed)
    np.testing.assert_allclose(found, logits(unrolled, params, **packed), atol=1e-5)
    swapped = {**params, "layers_0": params["layers_1"], "layers_1": params["layers_0"]}
    assert np.abs(logits(scanned, stack(swapped, 2), **packed) - found).max() > 0.1


def test_layers_are_scanned_where_the_platform_that_is_compiled_for_scans():
    assert resolve_layer_loop(tiny_config(), "cpu").layer_loop == "unroll"
    assert resolve_layer_loop(tiny_config(), "tpu").layer_loop == "scan"
    assert resolve_layer_loop(tiny_config(layer_loop="unroll"), "tpu").layer_loop == "unroll"


def loss(params: Any, config: ModelConfig) -> jax.Array:
    return jnp.mean(jax.nn.logsumexp(logits(config, params, random_tokens(1, 6)), axis=-1) ** 2)


@pytest.mark.parametrize(("layer_loop", "remat"), [("scan", "full"), ("unroll", "dots_no_batch")])
def test_rematerialization_changes_no_value(layer_loop: str, remat: str):
    plain = tiny_config(layer_loop=layer_loop)
    params = random_params(plain)
    gradient = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    expected, found = (
        gradient(params, plain),
        gradient(params, dataclasses.replace(plain, remat=remat)),
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
    )


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_rematerialization_multiplies_out_again_what_is_not_kept(
    layer_loop: str, monkeypatch: pytest.MonkeyPatch
):
    # As accelerators have it: on CPU, products with gradients of their own are multiplied out again
    # in any case.
    monkeypatch.setattr("research.kernels.projection.platform", lambda: "tpu")
    products = {}
    for remat in ("none", "dots", "dots_no_batch", "full"):
        config = tiny_config(
            attention={"implementation": "reference"}, layer_loop=layer_loop, remat=remat
        )
        text = str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(random_params(config), config))
        products[remat] = text.count("dot_general")
    # Attention's products have batch dimensions.
    assert products["none"] == products["dots"] < products["dots_no_batch"] < products["full"]


def kept_products(jaxpr: Any) -> int:
    """How many matrix products of a program are in no part that is rematerialized."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name not in ("checkpoint", "remat2"):
            count += equation.primitive.name == "dot_general"
            count += sum(kept_products(inner) for inner in jaxprs_in_params(equation.params))
    return count


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_every_layer_is_rematerialized(layer_loop: str):
    windows = (LayerConfig(window=4), LayerConfig())
    config = tiny_config(
        num_layers=6, first_layers=(LayerConfig(),), pattern=windows, layer_loop=layer_loop
    )
    params = nn.unbox(
        abstract_params(config)
    )  # two rounds of the pattern, and one layer after them
    kept = {
        remat: kept_products(
            jax.make_jaxpr(loss, static_argnums=1)(
                params, dataclasses.replace(config, remat=remat)
            ).jaxpr
        )
        for remat in ("none", "full")
    }
    assert kept["full"] == 1 < kept["none"]  # the logits


@functools.partial(jax.jit, static_argnums=0)
def hidden(config: ModelConfig, params: Any, key: jax.Array | None) -> jax.Array:
    tokens, positions = jnp.asarray(random_tokens(1, 14)), jnp.arange(14)[None]
    rngs = {} if key is None else {"dropout": key}
    inputs = {"tokens": tokens, "positions": positions}
    return (
        Transformer(config)
        .apply({"params": params}, inputs, deterministic=key is None, rngs=rngs)
        .hidden
    )


@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_dropout_acts_only_when_asked_and_follows_its_key(layer_loop: str):
    config = tiny_config(layer_loop=layer_loop, dropout=0.5)
    params = random_params(config)
    still = hidden(dataclasses.replace(config, dropout=0.0), params, None)
    one, other = (hidden(config, params, jax.random.key(seed)) for seed in (1, 2))
    np.testing.assert_array_equal(hidden(config, params, None), still)
    np.testing.assert_array_equal(hidden(config, params, jax.random.key(1)), one)
    assert np.abs(one - other).max() > 0.1
    assert np.abs(one - still).max() > 0.1


@pytest.mark.fast_cases("scan")
@pytest.mark.parametrize("layer_loop", ["scan", "unroll"])
def test_dropout_is_drawn_alike_where_it_is_rematerialized(layer_loop: str):
    config = tiny_config(layer_loop=layer_loop, dropout=0.5)
    params, key = random_params(config), jax.random.key(1)

    def slope(config: ModelConfig) -> Any:
        return jax.jit(jax.grad(lambda params: jnp.sum(hidden(config, params, key) ** 2)))(params)

    found, expected = slope(dataclasses.replace(config, remat="full")), slope(config)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, expected
    )


def test_half_precision_is_near_and_keeps_float32_parameters_and_logits(params, packed):
    config = tiny_config(dtype="bfloat16")
    found = logits(config, params, **packed)
    exact = logits(tiny_config(), params, **packed)
    assert found.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nn.unbox(abstract_params(config)))} == {
        jnp.dtype("float32")
    }
    difference = np.abs(found - exact)[:, :12]
    assert 1e-4 < difference.max() < 0.3

"""FLOPs of a training step: claims about `models.flops`."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.models.config import (
    AttentionConfig,
    ExpertsConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
    PositionConfig,
)
from research.models.flops import matmul_parameters, train_flops_per_token, visible_keys
from research.models.masks import sequence_mask


def config(num_layers, embed_dim, heads, kv_heads, head_dim, mlp_dim, gated, vocab_size):
    attention = AttentionConfig(num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    mlp = MlpConfig(hidden_dim=mlp_dim, gated=gated)
    return ModelConfig(vocab_size, num_layers, embed_dim, 1024, attention, mlp)


def test_gpt2_small_by_hand():
    gpt2 = config(12, 768, 12, 12, 64, 3072, False, 50257)
    weights = 12 * (4 * 768 * 768 + 2 * 768 * 3072) + 768 * 50257
    assert matmul_parameters(gpt2) == weights == 123_532_032
    attention = 3 * 12 * (2 * 1024 * 768 + 2 * 1024 * 768)
    assert train_flops_per_token(gpt2, 1024, visible_only=False) == 6 * weights + attention
    assert train_flops_per_token(gpt2, 1024) == 6 * weights + attention // 2


def test_llama3_8b_by_hand():
    weights = matmul_parameters(config(32, 4096, 32, 8, 128, 14336, True, 128256))
    assert (
        weights == 8_030_261_248 - 128256 * 4096 - 65 * 4096
    )  # all, less the lookup table and the norms


def model(params, tokens, gated):
    """A decoder with the matrix products of a real one and nothing else."""
    x = params["embed"][tokens]
    for layer in params["layers"]:
        q = jnp.einsum("btd,dkgh->btkgh", x, layer["q"])
        k, v = (
            jnp.einsum("btd,dkh->btkh", x, layer["k"]),
            jnp.einsum("btd,dkh->btkh", x, layer["v"]),
        )
        mixed = jnp.einsum("bkgts,bskh->btkgh", jnp.einsum("btkgh,bskh->bkgts", q, k), v)
        x = jnp.einsum("btkgh,kghd->btd", mixed, layer["out"])
        hidden = jnp.einsum("btd,df->btf", x, layer["up"])
        if gated:
            hidden *= jnp.einsum("btd,df->btf", x, layer["gate"])
        x = jnp.einsum("btf,fd->btd", hidden, layer["down"])
    return jnp.einsum("btd,dv->btv", x, params["head"])


@pytest.mark.parametrize("gated", [True, False])
def test_count_equals_that_of_xla_for_a_model_of_matrix_products(gated):
    batch, length, layers, d, n, k, h, f, vocabulary = 2, 128, 2, 64, 4, 2, 48, 224, 320

    def shape(*sizes):
        return jax.ShapeDtypeStruct(sizes, jnp.float32)

    layer = {
        "q": shape(d, k, n // k, h),
        "k": shape(d, k, h),
        "v": shape(d, k, h),
        "out": shape(k, n // k, h, d),
    }
    layer |= {"up": shape(d, f), "down": shape(f, d)} | ({"gate": shape(d, f)} if gated else {})
    params = {
        "embed": shape(vocabulary, d),
        "layers": [layer] * layers,
        "head": shape(d, vocabulary),
    }
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)

    def step(params, tokens, cotangent):
        logits, pull = jax.vjp(lambda p: model(p, tokens, gated), params)
        return logits, pull(cotangent)

    lowered = jax.jit(step).lower(params, tokens, shape(batch, length, vocabulary))
    counted = lowered.cost_analysis()["flops"] / (batch * length)
    expected = train_flops_per_token(
        config(layers, d, n, k, h, f, gated, vocabulary), length, visible_only=False
    )
    # XLA also counts the additions where gradients meet, and those of the embedding's gradient.
    assert expected <= counted <= 1.01 * expected


def test_windows_count_what_they_show():
    base = config(2, 64, 4, 4, 16, 128, True, 100)
    local = dataclasses.replace(base, pattern=(LayerConfig(window=4), LayerConfig()))
    seen = np.tril(np.ones((64, 64))) * (np.subtract.outer(np.arange(64), np.arange(64)) < 4)
    # To half a key, as causal attention is counted as T / 2, not (T + 1) / 2.
    assert visible_keys(local, local.pattern[0], 64) == pytest.approx(seen.sum() / 64, abs=0.5)
    difference = train_flops_per_token(base, 64) - train_flops_per_token(local, 64)
    assert difference == 12 * 4 * 16 * (32 - visible_keys(local, local.pattern[0], 64))
    encoder = dataclasses.replace(base, structure="encoder")
    assert visible_keys(encoder, LayerConfig(), 64) == 64


def test_relative_positions_cost_a_second_score_a_key():
    base = config(2, 64, 4, 4, 16, 128, True, 100)
    relative = dataclasses.replace(base, position=PositionConfig(kind="relative"))
    difference = train_flops_per_token(relative, 64) - train_flops_per_token(base, 64)
    assert difference == 6 * 2 * 4 * 16 * 32  # layers, heads, width, keys


@pytest.mark.parametrize("structure", ["decoder", "encoder", "prefix"])
@pytest.mark.parametrize("window", [None, 4, 100])
def test_keys_are_those_that_the_mask_shows(structure, window):
    length = 24
    if structure == "prefix":  # each length of a prefix is as likely; there are no windows
        window, prefixes = None, 1 + np.arange(length)
    else:
        prefixes = np.zeros(1)
    base = dataclasses.replace(config(1, 64, 4, 4, 16, 128, True, 100), structure=structure)
    positions = jnp.broadcast_to(jnp.arange(length), (len(prefixes), length))
    inside = jnp.asarray(np.arange(length) < prefixes[:, None], jnp.int32)
    mask = dataclasses.replace(
        sequence_mask(base, positions, None, inside, cached=False), window=window
    )
    seen = (
        np.broadcast_to(mask.dense(length, length), (len(prefixes), 1, length, length))
        .sum(axis=-1)
        .mean()
    )
    assert visible_keys(base, LayerConfig(window=window), length) == pytest.approx(seen, abs=1)
    if structure == "prefix":
        assert abs(seen - length / 2) > 3  # as much as it differs from causal attention


def test_experts_count_those_that_a_token_goes_to():
    base = config(2, 64, 4, 4, 16, 128, True, 100)
    experts = ExpertsConfig(num_experts=8, experts_per_token=2, hidden_dim=64)
    mixed = dataclasses.replace(base, experts=experts)
    assert matmul_parameters(mixed) == matmul_parameters(base) + 2 * 8 * 64  # and the router


def test_encoder_decoder_counts_each_stack_for_its_own_tokens():
    both = dataclasses.replace(
        config(2, 64, 4, 4, 16, 128, True, 100), structure="encoder_decoder", encoder_layers=3
    )
    stack = 4 * 64 * 64 + 3 * 64 * 128
    decoder = 2 * (stack + 2 * 64 * 64) + 64 * 100
    encoder = 3 * stack + 2 * 2 * 64 * 64
    attention = 12 * 64 * (2 * 16 + 2 * 48 + 3 * 48 * 1.5)
    assert train_flops_per_token(both, 32, 48) == 6 * decoder + 6 * encoder * 1.5 + attention
    local = dataclasses.replace(
        both, pattern=(LayerConfig(window=8),)
    )  # which the encoder's tokens have on both sides
    hidden = 12 * 64 * (2 * (16 - 7) + 3 * (48 - 2 * (8 - 64 / 96)) * 1.5)
    assert train_flops_per_token(both, 32, 48) - train_flops_per_token(
        local, 32, 48
    ) == pytest.approx(hidden)

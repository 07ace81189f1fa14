"""What no family of `research.interop` has yet, against torch: post-norm and ALiBi as whole models, and the parts."""

import dataclasses
import re

import jax.numpy as jnp
import numpy as np
import pytest

from research.interop.architecture import Architecture
from research.interop.gpt2 import GPT2
from research.interop.mapping import params_from
from research.interop.tensor import Tensor
from research.kernels.attention import AttentionMask
from research.kernels.attention.mask import Span
from research.models.config import AttentionConfig, MlpConfig, ModelConfig, NormConfig, PositionConfig
from research.models.layers import ACTIVATIONS, Norm
from research.models.positions import alibi_slopes, sinusoidal
from tests.interop import cases
from tests.interop.folders import TOLERANCE, logits_of

_LAYER, _OURS = "transformer.blocks.{layer}", "{layer}"
_RENAMED = {"transformer.wte.": "transformer.tokens_embed.", "transformer.wpe.": "transformer.positions_embed."}

# Radford et al. 2018: GPT-2's tensors, but for the last norm, which post-norm does not have.
GPT1 = dataclasses.replace(
    GPT2,
    tensors=tuple(
        dataclasses.replace(tensor, theirs=re.sub(r"^transformer\.w.e\.", lambda m: _RENAMED[m[0]], tensor.theirs))
        for tensor in GPT2.tensors
        if ".ln_f." not in tensor.theirs
    ),
)
GPT1_CONFIG = ModelConfig(
    vocab_size=cases.VOCAB,
    num_layers=2,
    embed_dim=64,
    max_length=cases.LENGTH,
    attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=16, qkv_bias=True, out_bias=True),
    mlp=MlpConfig(hidden_dim=256, activation="gelu_tanh", gated=False, bias=True),
    norm=NormConfig(kind="layernorm", placement="post", epsilon=1e-5, bias=True),
    position=PositionConfig(kind="learned"),
    tied_embeddings=True,
)
# MosaicML 2023: ALiBi, exact GELU, no bias anywhere; six heads, so that slopes fill up between powers of two.
MPT = dataclasses.replace(
    GPT2,
    tensors=(
        Tensor("transformer.wte.weight", ("embed/embedding",), num_inputs=1),
        Tensor(f"{_LAYER}.norm_1.weight", (f"{_OURS}/attention_norm/scale",)),
        Tensor(
            f"{_LAYER}.attn.Wqkv.weight",
            tuple(f"{_OURS}/attention/{part}/kernel" for part in ("query", "key", "value")),
            num_inputs=1,
            transposed=True,
        ),
        Tensor(f"{_LAYER}.attn.out_proj.weight", (f"{_OURS}/attention/out/kernel",), num_inputs=2, transposed=True),
        Tensor(f"{_LAYER}.norm_2.weight", (f"{_OURS}/mlp_norm/scale",)),
        Tensor(f"{_LAYER}.ffn.up_proj.weight", (f"{_OURS}/mlp/up/kernel",), num_inputs=1, transposed=True),
        Tensor(f"{_LAYER}.ffn.down_proj.weight", (f"{_OURS}/mlp/down/kernel",), num_inputs=1, transposed=True),
        Tensor("transformer.norm_f.weight", ("final_norm/scale",)),
    ),
)
MPT_CONFIG = ModelConfig(
    vocab_size=cases.VOCAB,
    num_layers=2,
    embed_dim=60,
    max_length=cases.LENGTH,
    attention=AttentionConfig(num_heads=6, num_kv_heads=6, head_dim=10),
    mlp=MlpConfig(hidden_dim=240, activation="gelu", gated=False),
    norm=NormConfig(kind="layernorm", epsilon=1e-5),
    position=PositionConfig(kind="alibi"),
    tied_embeddings=True,
)


def off_by(name: str, architecture: Architecture, config: ModelConfig, **changes) -> float:
    """The largest difference from torch's logits, once `changes` are made."""
    params = params_from(architecture, config, cases.weights(cases.stored()[name]["tensors"]))
    found = logits_of(dataclasses.replace(config, **changes), params, cases.tokens())
    return np.abs(found - cases.golden_logits(name)).max()


def test_post_norm_model_equals_gpt_1():
    assert off_by("gpt-1", GPT1, GPT1_CONFIG) < TOLERANCE


def test_alibi_model_equals_mpt():
    assert off_by("mpt", MPT, MPT_CONFIG) < TOLERANCE


def test_other_positions_and_activations_are_seen_by_the_comparison():
    assert off_by("mpt", MPT, MPT_CONFIG, position=PositionConfig(kind="none")) > 0.01
    approximate = dataclasses.replace(MPT_CONFIG.mlp, activation="gelu_tanh")
    assert off_by("mpt", MPT, MPT_CONFIG, mlp=approximate) > 2 * TOLERANCE


# What follows needs torch itself (extra `parity`).


@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 25, 32])
def test_alibi_equals_bloom_s_up_to_a_constant_a_query(heads):
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom", reason="needs the extra `parity`")
    keys = bloom.build_alibi_tensor(torch.ones(1, 9), heads, torch.float32).numpy()[:, 0]
    np.testing.assert_allclose(alibi_slopes(heads), keys[:, 1], rtol=1e-6)
    bias = -alibi_slopes(heads)[:, None] * np.asarray(AttentionMask().distance(Span(8, 1), Span(0, 9)))[0, 0]
    # Bloom gives a key its position times the slope; a query's softmax does not see the constant between the two.
    np.testing.assert_allclose(bias - bias[:, :1], keys, rtol=1e-5, atol=1e-6)


def test_sinusoidal_waves_equal_marian_s_with_their_columns_in_pairs():
    pytest.importorskip("torch", reason="needs the extra `parity`")
    marian = pytest.importorskip("transformers.models.marian.modeling_marian", reason="needs the extra `parity`")
    table = marian.MarianSinusoidalPositionalEmbedding(40, 16).create_weight().numpy()
    found = np.asarray(sinusoidal(jnp.arange(40)[None], 16))[0]
    np.testing.assert_allclose(np.concatenate([found[:, ::2], found[:, 1::2]], axis=1), table, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "function", "options"),
    [
        ("gelu", "gelu", {"approximate": "none"}),
        ("gelu_tanh", "gelu", {"approximate": "tanh"}),
        ("relu", "relu", {}),
        ("silu", "silu", {}),
    ],
)
def test_activation_equals_torch_s(name, function, options):
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    x = np.linspace(-8, 8, 1001, dtype=np.float32)
    wanted = getattr(torch.nn.functional, function)(torch.from_numpy(x), **options).numpy()
    np.testing.assert_allclose(ACTIVATIONS[name](x), wanted, atol=2e-6)


def test_every_activation_is_tested():
    assert set(ACTIVATIONS) == {"gelu", "gelu_tanh", "gelu_sigmoid", "relu", "silu"}


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
def test_norm_equals_torch_s(kind, epsilon):
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    x, scale, bias = np.random.RandomState(0).standard_normal((3, 4, 5, 16)).astype(np.float32) * 0.1
    x, scale, bias = x + 1, scale[0, 0], bias[0, 0]
    theirs = torch.nn.LayerNorm(16, eps=epsilon) if kind == "layernorm" else torch.nn.RMSNorm(16, eps=epsilon)
    params = {"scale": scale}
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(scale))
        if kind == "layernorm":
            theirs.bias.copy_(torch.from_numpy(bias))
            params["bias"] = bias
        wanted = theirs(torch.from_numpy(x)).numpy()
    config = NormConfig(kind=kind, epsilon=epsilon, bias=kind == "layernorm")
    np.testing.assert_allclose(Norm(config).apply({"params": params}, jnp.asarray(x)), wanted, atol=2e-6)

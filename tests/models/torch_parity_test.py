"""The parts of models against torch's and transformers' own (extra `parity`)."""

import jax.numpy as jnp
import numpy as np
import pytest

from research.kernels.attention import AttentionMask
from research.kernels.attention.mask import Span
from research.models.config import NormConfig
from research.models.layers import ACTIVATIONS, Norm
from research.models.positions import alibi_slopes, sinusoidal


@pytest.mark.live
@pytest.mark.parametrize("heads", [1, 2, 6, 8, 12, 25, 32])
def test_alibi_equals_bloom_s_up_to_a_constant_a_query(heads):
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    bloom = pytest.importorskip(
        "transformers.models.bloom.modeling_bloom", reason="needs the extra `parity`"
    )
    keys = bloom.build_alibi_tensor(torch.ones(1, 9), heads, torch.float32).numpy()[:, 0]
    np.testing.assert_allclose(alibi_slopes(heads), keys[:, 1], rtol=1e-6)
    bias = (
        -alibi_slopes(heads)[:, None]
        * np.asarray(AttentionMask().distance(Span(8, 1), Span(0, 9)))[0, 0]
    )
    # Bloom's bias of a key is its position times the slope; the softmax of a query is the same with
    # the constant difference between the two.
    np.testing.assert_allclose(bias - bias[:, :1], keys, rtol=1e-5, atol=1e-6)


@pytest.mark.live
@pytest.mark.parametrize("width", [16, 15])
def test_sinusoidal_waves_in_halves_equal_marian_s(width):
    pytest.importorskip("torch", reason="needs the extra `parity`")
    marian = pytest.importorskip(
        "transformers.models.marian.modeling_marian", reason="needs the extra `parity`"
    )
    table = marian.MarianSinusoidalPositionalEmbedding(40, width).create_weight().numpy()
    found = sinusoidal(jnp.arange(40)[None], width, halves=True)[0]
    np.testing.assert_allclose(found, table, atol=1e-5)


@pytest.mark.live
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


@pytest.mark.live
@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-2])
def test_norm_equals_torch_s(kind, epsilon):
    torch = pytest.importorskip("torch", reason="needs the extra `parity`")
    x, scale, bias = (
        np.random.RandomState(0).standard_normal((3, 4, 5, 16)).astype(np.float32) * 0.1
    )
    x, scale, bias = x + 1, scale[0, 0], bias[0, 0]
    theirs = (
        torch.nn.LayerNorm(16, eps=epsilon)
        if kind == "layernorm"
        else torch.nn.RMSNorm(16, eps=epsilon)
    )
    params = {"scale": jnp.asarray(scale)}
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(scale))
        if kind == "layernorm":
            theirs.bias.copy_(torch.from_numpy(bias))
            params["bias"] = jnp.asarray(bias)
        wanted = theirs(torch.from_numpy(x)).numpy()
    config = NormConfig(kind=kind, epsilon=epsilon, bias=kind == "layernorm")
    np.testing.assert_allclose(
        Norm(config).apply({"params": params}, jnp.asarray(x)), wanted, atol=2e-6
    )

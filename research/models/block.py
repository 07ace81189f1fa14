"""One transformer block: attention and MLP around the residual stream."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.attention import AttentionMask, attention
from research.models import positions as positional
from research.models.cache import LayerCache
from research.models.config import ModelConfig
from research.models.layers import Norm, Projection
from research.parallel.rules import constrain

# In float32, whatever the type: a bfloat16 chain is rounded at each of its steps, which on CPU takes most of the time.
ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype),
    "gelu_tanh": lambda x: jax.nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
}


def residual_stddev(config: ModelConfig) -> float:
    """Returns the initial deviation of projections into the residual stream, which 2L of them add to."""
    return config.init_stddev / math.sqrt(2 * config.num_layers)


class Attention(nn.Module):
    """Grouped-query attention: softmax(q kᵀ / √H + bias) v, then the output projection.

    Source: Ainslie et al. 2023, arXiv:2305.13245, section 2. With K = N it is multi-head attention.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        mask: AttentionMask,
        positions: Int[Array, "B T"],
        cache: LayerCache | None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        c, model = self.config.attention, self.config
        kv_shape, kv_names = (c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head")
        options = {"use_bias": c.qkv_bias, "stddev": model.init_stddev, "dtype": model.dtype}
        q = Projection((c.num_heads, c.head_dim), ("embed", "heads", "head"), name="query", **options)(x)
        k = Projection(kv_shape, kv_names, name="key", **options)(x)
        v = Projection(kv_shape, kv_names, name="value", **options)(x)
        q = constrain(positional.rotate(model.position, q, positions), ("batch", "length", "heads", "head"))
        k = constrain(positional.rotate(model.position, k, positions), ("batch", "length", "kv_heads", "head"))
        if cache is not None:
            cache, mask = cache.append(k, v, positions)
            k, v = cache.key, cache.value
        alibi = jnp.asarray(positional.alibi_slopes(c.num_heads)) if model.position.kind == "alibi" else None
        out = attention(q, k, v, mask=mask, alibi=alibi, implementation=c.implementation)
        out = Projection(
            x.shape[-1:],
            ("heads", "head", "embed"),
            num_inputs=2,
            use_bias=c.out_bias,
            stddev=residual_stddev(model),
            dtype=model.dtype,
            name="out",
        )(out)
        return out, cache


class Mlp(nn.Module):
    """The feed-forward sublayer: act(x U) D, or (act(x G) ⊙ x U) D where gated.

    Source: Shazeer 2020, arXiv:2002.05202, equations 5 and 6.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        c, model = self.config.mlp, self.config
        options = {"use_bias": c.bias, "dtype": model.dtype}
        inner = {"features": (c.hidden_dim,), "names": ("embed", "mlp"), "stddev": model.init_stddev}
        h = Projection(name="up", **inner, **options)(x)
        if c.gated:
            h = ACTIVATIONS[c.activation](Projection(name="gate", **inner, **options)(x)) * h
        else:
            h = ACTIVATIONS[c.activation](h)
        h = constrain(h, ("batch", "length", "mlp"))
        return Projection(x.shape[-1:], ("mlp", "embed"), stddev=residual_stddev(model), name="down", **options)(h)


class Block(nn.Module):
    """Two residual sublayers: x + f(norm(x)) with the norm before, norm(x + f(x)) with it after."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cache: LayerCache | None,
        mask: AttentionMask,
        positions: Int[Array, "B T"],
        deterministic: bool,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        c = self.config
        drop = nn.Dropout(c.dropout, deterministic=deterministic)
        pre = c.norm.placement == "pre"
        first, second = Norm(c.norm, name="attention_norm"), Norm(c.norm, name="mlp_norm")

        y, cache = Attention(c, name="attention")(first(x) if pre else x, mask, positions, cache)
        x = x + drop(y) if pre else first(x + drop(y))
        y = Mlp(c, name="mlp")(second(x) if pre else x)
        x = x + drop(y) if pre else second(x + drop(y))
        return constrain(x, ("batch", "length", "embed")), cache

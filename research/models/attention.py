"""The attention sublayers: self-attention, and cross-attention over the encoder's hidden states."""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention import ScoreTerms
from research.models import positions as positional
from research.models.cache import LayerCache
from research.models.config import AttentionConfig, LayerConfig, ModelConfig, NormConfig
from research.models.context import Context
from research.models.dot_product import DotProduct
from research.models.layers import Norm, Projection, parameter
from research.models.relative import RelativeScores
from research.parallel.gradient_sums import in_float32
from research.parallel.parameter import Axes
from research.parallel.rules import constrain


def residual_stddev(config: ModelConfig) -> float:
    """Returns the initial deviation of projections into the residual stream, which 2L of them add
    to.
    """
    return config.init_stddev / math.sqrt(2 * config.num_layers)


def project_heads(config: ModelConfig, name: str) -> Projection:
    """Returns the projection D → heads of `query`, `key` or `value`; a submodule of the module that
    is being called.
    """
    c = config.attention
    num_heads = c.num_heads if name == "query" else c.num_kv_heads
    axis = "heads" if name == "query" else "kv_heads"
    return Projection(
        (num_heads, c.head_dim),
        ("embed", axis, "head"),
        use_bias=c.qkv_bias,
        stddev=config.init_stddev,
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name=name,
    )


def project_out(config: ModelConfig) -> Projection:
    """Returns the projection of the heads back to D."""
    return Projection(
        (config.embed_dim,),
        ("heads", "head", "embed"),
        num_inputs=2,
        use_bias=config.attention.out_bias,
        stddev=residual_stddev(config),
        dtype=config.dtype,
        param_dtype=config.param_dtype,
        name="out",
    )


def head_norm(
    config: ModelConfig, names: tuple[str, ...], name: str, epsilon: float | None = None
) -> Norm:
    """Returns an RMS norm inside attention; None is the epsilon of the model's norms."""
    if epsilon is None:
        epsilon = config.norm.epsilon
    rms = NormConfig(kind="rmsnorm", epsilon=epsilon, unit_offset=config.norm.unit_offset)
    return Norm(rms, names, param_dtype=config.param_dtype, name=name)


def dot_product(
    config: AttentionConfig,
    width: int,
    *,
    bias: Float[Array, "#B #N #T #S"] | None = None,
    alibi: Float[Array, "N"] | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> DotProduct:
    """Returns the attention that the config names, with its scale and soft cap.

    Args:
      config: of the attention.
      width: of a query head: the scale is 1 / √width where the config has none.
      bias, alibi, sinks: terms of the scores that are arrays.
    """
    scale = 1 / math.sqrt(width) if config.scale is None else config.scale
    terms = ScoreTerms(bias, alibi, sinks, config.softcap, scale)
    return DotProduct(terms, config.implementation, config.exchange)


class Attention(nn.Module):
    """Grouped-query attention: softmax(q kᵀ / √H + bias) v, then the output projection.

    Source: Ainslie et al. 2023, arXiv:2305.13245, section 2. With K = N it is multi-head attention.
    """

    config: ModelConfig
    layer: LayerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        model = self.config
        c = model.attention
        position = model.position_of(self.layer)

        # [B, T, D] -> [B, T, N, H], [B, T, K, H], [B, T, K, H]
        q, k, v = (project_heads(model, name)(x) for name in ("query", "key", "value"))
        q, k = self._normalize(q, k)
        q = positional.rotate(position, q, context.positions, context.lengths)
        k = positional.rotate(position, k, context.positions, context.lengths)
        q = constrain(q, ("batch", "length", "heads", "head"))
        k = constrain(k, ("batch", "length", "kv_heads", "head"))

        bias = context.bias
        if position.kind == "relative":
            q, bias = RelativeScores(model, name="relative")(q, context)
        alibi = None
        if position.kind == "alibi":
            alibi = jnp.asarray(positional.alibi_slopes(c.num_heads))
        attention = dot_product(c, c.head_dim, bias=bias, alibi=alibi, sinks=self._sinks())

        mask = dataclasses.replace(context.mask, window=self.layer.window)
        if cache is None:
            out = attention(q, k, v, mask)
        else:
            # The cache alone knows where the keys of earlier tokens are stored.
            out, cache = cache.attend(
                q,
                k,
                v,
                mask=mask,
                positions=context.positions,
                page_table=context.page_table,
                attention=attention,
            )
        return project_out(model)(out), cache

    def _normalize(
        self, q: Float[Array, "B T N H"], k: Float[Array, "B T K H"]
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"]]:
        """Returns queries and keys, normalized head by head or all heads together."""
        model = self.config
        if model.attention.qk_norm == "none":
            return q, k

        by_head = model.attention.qk_norm == "head"
        q_axes = ("head",) if by_head else ("heads", "head")
        k_axes = ("head",) if by_head else ("kv_heads", "head")
        q = head_norm(model, q_axes, "query_norm")(q)
        k = head_norm(model, k_axes, "key_norm")(k)
        return q, k

    def _sinks(self) -> Float[Array, "N"] | None:
        """Returns the logit of each head that takes part in the softmax's denominator only."""
        model = self.config
        if not model.attention.sinks:
            return None
        init = nn.initializers.normal(model.init_stddev)
        shape = (model.attention.num_heads,)
        axes = Axes(("heads",), "bias")
        sinks = parameter(self, "sinks", init, shape, axes, model.param_dtype)
        return in_float32(sinks)


class CrossAttention(nn.Module):
    """Attention over the encoder's last hidden states: softmax(q kᵀ / √H) v, without positions.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        model = self.config
        q = project_heads(model, "query")(x)
        q = constrain(q, ("batch", "length", "heads", "head"))
        attention = dot_product(model.attention, model.attention.head_dim)

        if context.memory is None:
            # After the prompt: keys and values of the encoder are in the cache.
            assert cache is not None, "neither the encoder's hidden states nor a cache of them"
            out = cache.attend_memory(q, mask=context.memory_mask, attention=attention)
        else:
            # [B, M, D] -> [B, M, K, H], twice
            k, v = (project_heads(model, name)(context.memory) for name in ("key", "value"))
            out = attention(q, k, v, context.memory_mask)
            if cache is not None:
                cache = cache.write_memory(k, v)
        return project_out(model)(out), cache

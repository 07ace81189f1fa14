"""The attention sublayers: over the sequence itself, and over what an encoder made of another
one.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Shaped

from research.core.trees import node
from research.kernels.attention import AttentionMask, ScoreTerms
from research.models import positions as positional
from research.models.cache import LayerCache
from research.models.config import AttentionConfig, LayerConfig, ModelConfig, NormConfig
from research.models.dot_product import DotProduct
from research.models.layers import Norm, Projection, parameter
from research.models.paged_cache import PageTable
from research.parallel.parameter import Axes
from research.parallel.rules import constrain


@node(static=())
@dataclasses.dataclass(frozen=True)
class Context:
    """What each layer of a stack is told beside its input.

    Attributes:
      positions: of each token in its document.
      mask: who sees whom, without a layer's window.
      lengths: of each token's document, for rotary frequencies that go by it.
      bias: added to the scores of every layer, or None.
      memory: what the encoder made of its sequence, or None where there is none or the cache holds
          it.
      memory_mask: who sees it.
      page_table: where the pages of each row lie, where there is a paged cache.
      key: of the layers' dropout; None drops nothing.
    """

    positions: Int[Array, "B T"]
    mask: AttentionMask
    lengths: Int[Array, "B T"] | None = None
    bias: Float[Array, "#B N #T S"] | None = None
    memory: Float[Array, "B M D"] | None = None
    memory_mask: AttentionMask | None = None
    page_table: PageTable | None = None
    key: Key[Array, ""] | None = None

    def real(self) -> Shaped[Array, "B T"] | None:
        """Returns which tokens are no padding; None is all of them."""
        return None if self.mask.q_segments is None else self.mask.q_segments != 0


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
    heads, axis = (c.num_heads, "heads") if name == "query" else (c.num_kv_heads, "kv_heads")
    return Projection(
        (heads, c.head_dim),
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
    epsilon = config.norm.epsilon if epsilon is None else epsilon
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
    return DotProduct(ScoreTerms(bias, alibi, sinks, config.softcap, scale), config.implementation)


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
        model, c = self.config, self.config.attention
        position, positions = model.position_of(self.layer), context.positions
        q, k, v = (project_heads(model, name)(x) for name in ("query", "key", "value"))
        if c.qk_norm != "none":
            together = {"head": ("head",), "all": ("heads", "head")}[c.qk_norm]
            q = head_norm(model, together, "query_norm")(q)
            k = head_norm(
                model, together if c.qk_norm == "head" else ("kv_heads", "head"), "key_norm"
            )(k)
        q = positional.rotate(position, q, positions, context.lengths)
        k = positional.rotate(position, k, positions, context.lengths)
        q = constrain(q, ("batch", "length", "heads", "head"))
        k = constrain(k, ("batch", "length", "kv_heads", "head"))
        bias = context.bias
        if position.kind == "relative":
            slots = None if cache is None else cache.slots
            q, bias = RelativeScores(model, name="relative")(q, context, slots)
        alibi = (
            jnp.asarray(positional.alibi_slopes(c.num_heads)) if position.kind == "alibi" else None
        )
        sinks = None
        if c.sinks:
            init = nn.initializers.normal(model.init_stddev)
            sinks = parameter(
                self, "sinks", init, (c.num_heads,), Axes(("heads",), "bias"), model.param_dtype
            )
            sinks = sinks.astype(jnp.float32)

        mask = dataclasses.replace(context.mask, window=self.layer.window)
        attention = dot_product(c, c.head_dim, bias=bias, alibi=alibi, sinks=sinks)
        if cache is None:
            out = attention(q, k, v, mask)
        else:
            # Where the keys of earlier tokens lie is known to the cache alone.
            where = {"positions": positions, "page_table": context.page_table}
            out, cache = cache.attend(q, k, v, mask=mask, attention=attention, **where)
        return project_out(model)(out), cache


class RelativeScores(nn.Module):
    """Scores by distance that depend on the query: (q + b) · R(t − s), with R the projected waves
    of a distance.

    Returns the query that meets the keys, q + a, and those scores as a bias, which takes [B, N, T,
    S]. Without a cache a score stands for each distance that is seen, and is shifted to its key;
    what lies outside is hidden by the mask.

    Source: Dai et al. 2019 (Transformer-XL), arXiv:1901.02860, section 3.3, where a and b are u and
        v, and appendix B.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, q: Float[Array, "B T N H"], context: Context, slots: int | None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
        model, c = self.config, self.config.attention
        shape, names = (c.num_heads, c.head_dim), ("heads", "head")
        zeros = nn.initializers.zeros
        content = parameter(self, "content", zeros, shape, Axes(names, "bias"), model.param_dtype)
        distance = parameter(self, "distance", zeros, shape, Axes(names, "bias"), model.param_dtype)
        content, distance = (x.astype(q.dtype)[None, None] for x in (content, distance))
        before = q.shape[1] if slots is None else max(slots, q.shape[1])
        only_before = slots is None and context.mask.causal and context.mask.prefix is None
        distances = jnp.arange(before - 1, -1 if only_before else -before, -1)
        options = {
            "stddev": model.init_stddev,
            "dtype": model.dtype,
            "param_dtype": model.param_dtype,
        }
        r = Projection(shape, ("embed", *names), name="projection", **options)(
            positional.sinusoidal(distances, model.embed_dim)
        )
        r = r * jnp.asarray(1 / math.sqrt(c.head_dim) if c.scale is None else c.scale, r.dtype)
        scores = jnp.einsum("btnh,xnh->bntx", q + distance, r, preferred_element_type=jnp.float32)
        if slots is None:
            return q + content, relative_shift(scores)
        which = jnp.clip(
            before - 1 - context.positions[:, :, None] + jnp.arange(slots)[None, None],
            0,
            2 * before - 2,
        )
        which = jnp.broadcast_to(which[:, None], (*scores.shape[:3], slots))
        return q + content, jnp.take_along_axis(scores, which, axis=-1)


def relative_shift(scores: Float[Array, "B N T distances"]) -> Float[Array, "B N T T"]:
    """Returns y[t, s] = x[t, T − 1 − t + s], where x has it: the scores of distances T − 1, T − 2,
    … by key.

    With a column more in front, and cut anew into rows of the old width, each row starts one later
    than the one before.

    Source: Dai et al. 2019, arXiv:1901.02860, appendix B.
    """
    *lead, length, width = scores.shape
    flat = jnp.pad(scores, [(0, 0)] * len(lead) + [(0, 0), (1, 0)]).reshape(
        *lead, length * (width + 1)
    )
    return flat[..., length:].reshape(*lead, length, width)[..., :length]


class CrossAttention(nn.Module):
    """Attention over the encoder's last states: softmax(q kᵀ / √H) v; positions do not enter.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.2.3.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        model = self.config
        q = constrain(project_heads(model, "query")(x), ("batch", "length", "heads", "head"))
        attention = dot_product(model.attention, model.attention.head_dim)
        if context.memory is None:
            assert cache is not None, "neither an encoder's output nor a cache that holds it"
            out = cache.attend_memory(q, mask=context.memory_mask, attention=attention)
        else:
            k, v = (project_heads(model, name)(context.memory) for name in ("key", "value"))
            out = attention(q, k, v, context.memory_mask)
            if cache is not None:
                cache = cache.write_memory(k, v)
        return project_out(model)(out), cache

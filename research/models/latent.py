"""Multi-head latent attention: keys and values of all heads come from one narrow latent a token."""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention import AttentionMask
from research.models import positions as positional
from research.models.attention import Context, append, attend, head_norm, project_out
from research.models.cache import LayerCache
from research.models.config import AttentionConfig, LayerConfig, ModelConfig
from research.models.layers import Projection
from research.parallel.rules import constrain
from research.parallel.target import platform


class LatentAttention(nn.Module):
    """Attention whose cache holds a latent c and one turned key r a token instead of all heads' keys and values.

        c = norm(x W_c),  r = turn(x W_r),  k_n = [c W_k,n, r],  v_n = c W_v,n,  q_n = [.., turn(..)] of norm(x W_q)

    Source: DeepSeek-AI 2024 (DeepSeek-V2), arXiv:2405.04434, section 2.1, equations 9 to 19.
    """

    config: ModelConfig
    layer: LayerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        model, c = self.config, self.config.attention
        latent, position = c.latent, model.position_of(self.layer)
        assert latent is not None
        options = {"stddev": model.init_stddev, "dtype": model.dtype}

        def turn(heads: Float[Array, "B T heads R"]) -> Float[Array, "B T heads R"]:
            return positional.rotate(position, heads, context.positions, context.lengths)

        source, axis = x, "embed"
        if latent.q_dim is not None:
            narrow = Projection((latent.q_dim,), ("embed", "latent"), name="query_down", **options)(x)
            source, axis = head_norm(model, ("latent",), "query_norm", latent.epsilon)(narrow), "latent"
        width = c.head_dim + latent.rope_dim
        q = Projection((c.num_heads, width), (axis, "heads", "head"), name="query", **options)(source)
        q = jnp.concatenate([q[..., : c.head_dim], turn(q[..., c.head_dim :])], axis=-1)

        states = Projection((latent.kv_dim,), ("embed", "latent"), name="latent", **options)(x)
        states = head_norm(model, ("latent",), "latent_norm", latent.epsilon)(states)
        turned = turn(Projection((1, latent.rope_dim), ("embed", "types", "head"), name="turned_key", **options)(x))
        mask = context.mask
        if cache is not None:
            cache, mask = append(cache, states[:, :, None], turned, context)
            states, turned = cache.key[:, :, 0], cache.value
        key = Projection((c.num_heads, c.head_dim), ("latent", "heads", "head"), name="key", **options)
        value = Projection((c.num_heads, latent.value_dim), ("latent", "heads", "head"), name="value", **options)
        scale = 1 / math.sqrt(width) if c.scale is None else c.scale
        scaled = dataclasses.replace(model, attention=dataclasses.replace(c, scale=scale))
        form = _absorbed if cache is not None and absorbs(c, x.shape[1], states.shape[1]) else _unfolded
        out = form(scaled, key, value, q, states, turned, dataclasses.replace(mask, window=self.layer.window))
        return project_out(model)(out), cache


def absorbs(c: AttentionConfig, queries: int, slots: int) -> bool:
    """Whether queries go to the latents of the cache, and not these to the heads: few queries, and many slots.

    Multiplications of a head, first those with W_k,n and W_v,n, then those of its scores and sums:

        slots · kv_dim (H + value_dim) + queries · slots (H + rope_dim + value_dim)       unfolded
        queries · kv_dim (H + value_dim) + queries · slots (2 kv_dim + rope_dim)          absorbed

    Besides, the scores of all heads must be no more than the cache holds, for a body may hold them at once.

    Args:
      c: with `latent`.
      queries: new tokens of a sequence, T.
      slots: of the cache, S.
    """
    latent = c.latent
    assert latent is not None
    matrices, read = latent.kv_dim * (c.head_dim + latent.value_dim), latent.kv_dim + latent.rope_dim
    unfolded = slots * matrices + queries * slots * (c.head_dim + latent.rope_dim + latent.value_dim)
    absorbed = queries * matrices + queries * slots * (latent.kv_dim + read)
    return absorbed < unfolded and queries * c.num_heads <= read


def _unfolded(
    model: ModelConfig,
    key: Projection,
    value: Projection,
    q: Float[Array, "B T N H"],
    states: Float[Array, "B S C"],
    turned: Float[Array, "B S 1 R"],
    mask: AttentionMask,
) -> Float[Array, "B T N V"]:
    """Attention over keys and values of all heads."""
    k, v = key(states), value(states)
    k = jnp.concatenate([k, jnp.broadcast_to(turned, (*k.shape[:3], turned.shape[3]))], axis=-1)
    q, k = (constrain(array, ("batch", "length", "heads", "head")) for array in (q, k))
    # The kernels know one head width: the narrower side is filled up with zeros, which add nothing.
    widest = max(q.shape[3], v.shape[3])
    return attend(model, _fill(q, widest), _fill(k, widest), _fill(v, widest), mask)[..., : v.shape[3]]


def _absorbed(
    model: ModelConfig,
    key: Projection,
    value: Projection,
    q: Float[Array, "B T N H"],
    states: Float[Array, "B S C"],
    turned: Float[Array, "B S 1 R"],
    mask: AttentionMask,
) -> Float[Array, "B T N V"]:
    """Attention with one key head, the latents: q_n · (c W_k,n) = (q_n W_k,nᵀ) · c, and Σ p (c W_v,n) = (Σ p c) W_v,n.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), arXiv:2405.04434, section 2.1.2.
    """
    c, width = model.attention, states.shape[2]
    to_key, to_value = (each.weights((width,))[0].astype(q.dtype) for each in (key, value))
    plain = jnp.einsum("BTNH,CNH->BTNC", q[..., : c.head_dim], to_key)
    q = jnp.concatenate([plain, q[..., c.head_dim :]], axis=-1)
    q = constrain(q, ("batch", "length", "heads", "head"))
    k = jnp.concatenate([states[:, :, None], turned], axis=-1)
    if platform() != "cpu":  # whose kernels take no head as wide as a latent; scores as few as these may be held
        model = dataclasses.replace(model, attention=dataclasses.replace(c, implementation="reference"))
    # The keys are the values too: what their turned columns sum up to is left out.
    sums = attend(model, q, k, k, mask)[..., :width]
    return jnp.einsum("BTNC,CNV->BTNV", sums, to_value)


def _fill(x: Float[Array, "B T heads W"], width: int) -> Float[Array, "B T heads H"]:
    return x if x.shape[-1] == width else jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))

"""Multi-head latent attention (MLA): keys and values of all heads come from one narrow latent a
token.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention import AttentionMask, for_wide_heads
from research.kernels.weights import einsum
from research.models import positions as positional
from research.models.attention import Context, dot_product, head_norm, project_out
from research.models.cache import LayerCache
from research.models.config import AttentionConfig, LayerConfig, ModelConfig
from research.models.layers import Projection
from research.parallel.rules import constrain


class LatentAttention(nn.Module):
    """Attention whose cache holds a latent c and one rotary key r a token instead of all heads'
    keys and values.

        c = norm(x W_c),  r = rope(x W_r),  k_n = [c W_k,n, r],  v_n = c W_v,n,  q_n = [..,
        rope(..)] of norm(x W_q)

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
        options = {
            "stddev": model.init_stddev,
            "dtype": model.dtype,
            "param_dtype": model.param_dtype,
        }

        def rope(heads: Float[Array, "B T heads rope"]) -> Float[Array, "B T heads rope"]:
            return positional.rotate(position, heads, context.positions, context.lengths)

        source, axis = x, "embed"
        if latent.q_dim is not None:
            narrow = Projection((latent.q_dim,), ("embed", "latent"), name="query_down", **options)(
                x
            )
            source, axis = (
                head_norm(model, ("latent",), "query_norm", latent.epsilon)(narrow),
                "latent",
            )
        width = c.head_dim + latent.rope_dim
        q = Projection((c.num_heads, width), (axis, "heads", "head"), name="query", **options)(
            source
        )
        q = jnp.concatenate([q[..., : c.head_dim], rope(q[..., c.head_dim :])], axis=-1)

        latents = Projection((latent.kv_dim,), ("embed", "latent"), name="latent", **options)(x)
        latents = head_norm(model, ("latent",), "latent_norm", latent.epsilon)(latents)
        # The name on disk is older than the word for it.
        k_rope = Projection(
            (1, latent.rope_dim), ("embed", "types", "head"), name="turned_key", **options
        )(x)
        k_rope = rope(k_rope)[:, :, 0]

        key = Projection(
            (c.num_heads, c.head_dim), ("latent", "heads", "head"), name="key", **options
        )
        value = Projection(
            (c.num_heads, latent.value_dim), ("latent", "heads", "head"), name="value", **options
        )
        mask = dataclasses.replace(context.mask, window=self.layer.window)
        if cache is None:
            out = _decompressed(c, key, value, q, latents, k_rope, mask)
        else:
            form = (
                _absorbed if uses_weight_absorption(c, x.shape[1], cache.slots) else _decompressed
            )
            attention = functools.partial(form, c, key, value)
            where = {"positions": context.positions, "page_table": context.page_table}
            out, cache = cache.attend(q, latents, k_rope, mask=mask, attention=attention, **where)
        return project_out(model)(out), cache


def uses_weight_absorption(c: AttentionConfig, queries: int, slots: int) -> bool:
    """Whether MLA weight absorption is cheaper than decompressed MLA: with few queries, and many
    slots.

    Absorbed, W_k,n is multiplied into the queries and W_v,n into the sums, so that attention runs
    over the latents themselves. Decompressed, latents of all slots are projected to the keys and
    values of all heads. Multiplications of a head, first those with W_k,n and W_v,n, then those of
    its scores and sums:

        slots · kv_dim (H + value_dim) + queries · slots (H + rope_dim + value_dim)
        decompressed queries · kv_dim (H + value_dim) + queries · slots (2 kv_dim + rope_dim)
        absorbed

    Besides, the scores of all heads must be no more than the cache holds, for an implementation may
    hold them at once.

    Args:
      c: with `latent`.
      queries: new tokens of a sequence, T.
      slots: of the cache, S.
    """
    latent = c.latent
    assert latent is not None
    matrices = latent.kv_dim * (c.head_dim + latent.value_dim)
    cached = latent.kv_dim + latent.rope_dim
    decompressed = slots * matrices + queries * slots * (
        c.head_dim + latent.rope_dim + latent.value_dim
    )
    absorbed = queries * matrices + queries * slots * (latent.kv_dim + cached)
    return absorbed < decompressed and queries * c.num_heads <= cached


def _decompressed(
    c: AttentionConfig,
    key: Projection,
    value: Projection,
    q: Float[Array, "B T N H"],
    latents: Float[Array, "B S latent"],
    k_rope: Float[Array, "B S rope"],
    mask: AttentionMask,
) -> Float[Array, "B T N value"]:
    """Decompressed MLA: attention over keys and values of all heads."""
    k, v = key(latents), value(latents)
    # [B, S, R] -> [B, S, N, R]: all heads share the rotary part.
    shared = jnp.broadcast_to(k_rope[:, :, None], (*k.shape[:3], k_rope.shape[2]))
    k = jnp.concatenate([k, shared], axis=-1)
    q, k = (constrain(array, ("batch", "length", "heads", "head")) for array in (q, k))
    # The kernels know one head width: the narrower side is filled up with zeros, which add nothing.
    widest = max(q.shape[3], v.shape[3])
    attention = dot_product(c, q.shape[3])
    return attention(_fill(q, widest), _fill(k, widest), _fill(v, widest), mask)[..., : v.shape[3]]


def _absorbed(
    c: AttentionConfig,
    key: Projection,
    value: Projection,
    q: Float[Array, "B T N H"],
    latents: Float[Array, "B S latent"],
    k_rope: Float[Array, "B S rope"],
    mask: AttentionMask,
) -> Float[Array, "B T N value"]:
    """MLA weight absorption: attention with one key head, the latents.

        q_n · (c W_k,n) = (q_n W_k,nᵀ) · c,    Σ p (c W_v,n) = (Σ p c) W_v,n

    Source: DeepSeek-AI 2024 (DeepSeek-V2), arXiv:2405.04434, section 2.1.2.
    """
    width = latents.shape[2]
    attention = dot_product(c, q.shape[3])
    to_key, to_value = (each.weights((width,))[0] for each in (key, value))
    plain = einsum("BTNH,CNH->BTNC", q[..., : c.head_dim], to_key)
    q = jnp.concatenate([plain, q[..., c.head_dim :]], axis=-1)
    q = constrain(q, ("batch", "length", "heads", "head"))
    k = jnp.concatenate([latents, k_rope], axis=-1)[:, :, None]
    attention = dataclasses.replace(
        attention, implementation=for_wide_heads(attention.implementation)
    )
    # The keys are the values too: what their rotary columns sum up to is left out.
    sums = attention(q, k, k, mask)[..., :width]
    return einsum("BTNC,CNV->BTNV", sums, to_value)


def _fill(x: Float[Array, "B T heads width"], width: int) -> Float[Array, "B T heads padded"]:
    return (
        x
        if x.shape[-1] == width
        else jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))
    )

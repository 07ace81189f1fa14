"""Multi-head latent attention (MLA): keys and values of all heads are made from one narrow latent
per token.
"""

import dataclasses
import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention import AttentionMask, for_wide_heads
from research.kernels.weights import einsum
from research.models import positions as positional
from research.models.attention import dot_product, head_norm, project_out
from research.models.cache import LayerCache
from research.models.config import AttentionConfig, LayerConfig, ModelConfig
from research.models.context import Context
from research.models.layers import Projection
from research.parallel.rules import constrain


class LatentAttention(nn.Module):
    """Attention whose cache holds a latent c and one rotary key r per token instead of all heads'
    keys and values.

        c = norm(x W_c),  r = rope(x W_r),  k_n = [c W_k,n, r],  v_n = c W_v,n,  q_n = [..,
        rope(..)] of norm(x W_q)

    Without a cache it is decompressed MLA; with one, `uses_weight_absorption` decides.

    Source: DeepSeek-AI 2024 (DeepSeek-V2), arXiv:2405.04434, section 2.1, equations 9 to 19.
    """

    config: ModelConfig
    layer: LayerConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"], context: Context, cache: LayerCache | None
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:
        model = self.config
        c = model.attention
        latent = c.latent
        assert latent is not None

        q = self._queries(x, context)

        # What the cache keeps of a token: [B, T, D] -> [B, T, latent] and [B, T, rope].
        latents = self._projection("latent", (latent.kv_dim,), ("embed", "latent"))(x)
        latents = head_norm(model, ("latent",), "latent_norm", latent.epsilon)(latents)
        # The name on disk is older than the word for it. One head for all query heads.
        k_rope_axes = ("embed", "single", "head")
        k_rope = self._projection("turned_key", (1, latent.rope_dim), k_rope_axes)(x)
        k_rope = self._rotate(k_rope, context)[:, :, 0]

        to_keys = self._projection("key", (c.num_heads, c.head_dim), ("latent", "heads", "head"))
        to_values = self._projection(
            "value", (c.num_heads, latent.value_dim), ("latent", "heads", "head")
        )
        mask = dataclasses.replace(context.mask, window=self.layer.window)
        if cache is None:
            out = _decompressed(c, to_keys, to_values, q, latents, k_rope, mask)
        else:
            if uses_weight_absorption(c, x.shape[1], context.slots):
                form = _weight_absorption
            else:
                form = _decompressed
            out, cache = cache.attend(
                q,
                latents,
                k_rope,
                mask=mask,
                positions=context.positions,
                page_table=context.page_table,
                attention=functools.partial(form, c, to_keys, to_values),
            )
        return project_out(model)(out), cache

    def _queries(self, x: Float[Array, "B T D"], context: Context) -> Float[Array, "B T N H"]:
        """Returns queries of `head_dim` columns without position, then `rope_dim` rotary ones."""
        model = self.config
        c = model.attention
        source = x
        source_axis = "embed"
        if c.latent.q_dim is not None:
            source = self._projection("query_down", (c.latent.q_dim,), ("embed", "latent"))(x)
            source = head_norm(model, ("latent",), "query_norm", c.latent.epsilon)(source)
            source_axis = "latent"

        width = c.head_dim + c.latent.rope_dim
        names = (source_axis, "heads", "head")
        q = self._projection("query", (c.num_heads, width), names)(source)
        q_nope = q[..., : c.head_dim]
        q_rope = self._rotate(q[..., c.head_dim :], context)
        return jnp.concatenate([q_nope, q_rope], axis=-1)

    def _rotate(
        self, heads: Float[Array, "B T heads rope"], context: Context
    ) -> Float[Array, "B T heads rope"]:
        position = self.config.position_of(self.layer)
        return positional.rotate(position, heads, context.positions, context.lengths)

    def _projection(
        self, name: str, features: tuple[int, ...], names: tuple[str, ...]
    ) -> Projection:
        return Projection(
            features,
            names,
            stddev=self.config.init_stddev,
            dtype=self.config.dtype,
            param_dtype=self.config.param_dtype,
            name=name,
        )


def uses_weight_absorption(c: AttentionConfig, queries: int, slots: int) -> bool:
    """Whether MLA weight absorption is cheaper than decompressed MLA: with few queries, and many
    slots.

    With weight absorption W_k,n is multiplied into the queries and W_v,n into the sums, so that
    attention runs over the latents themselves. Decompressed, latents of all slots are projected to
    the keys and values of all heads. Multiplications of a head, first those with W_k,n and W_v,n,
    then those of its scores and sums:

        decompressed:
            slots · kv_dim (H + value_dim) + queries · slots (H + rope_dim + value_dim)
        weight absorption:
            queries · kv_dim (H + value_dim) + queries · slots (2 kv_dim + rope_dim)

    Besides, the scores of all heads must be no more than the cache holds, for an implementation may
    hold them at once.

    Args:
      c: with `latent`.
      queries: new tokens of a sequence, T.
      slots: of the cache, S.
    """
    latent = c.latent
    assert latent is not None
    up_projections = latent.kv_dim * (c.head_dim + latent.value_dim)
    cached_width = latent.kv_dim + latent.rope_dim

    head_width = c.head_dim + latent.rope_dim + latent.value_dim
    decompressed = slots * up_projections + queries * slots * head_width
    latent_width = latent.kv_dim + cached_width
    weight_absorption = queries * up_projections + queries * slots * latent_width
    scores_fit = queries * c.num_heads <= cached_width
    return weight_absorption < decompressed and scores_fit


def _decompressed(
    c: AttentionConfig,
    to_keys: Projection,
    to_values: Projection,
    q: Float[Array, "B T N H"],
    latents: Float[Array, "B S latent"],
    k_rope: Float[Array, "B S rope"],
    mask: AttentionMask,
) -> Float[Array, "B T N value"]:
    """Decompressed MLA: attention over keys and values of all heads."""
    k_nope = to_keys(latents)
    v = to_values(latents)
    # All heads share the rotary part: [B, S, rope] -> [B, S, N, rope].
    rope_shape = (*k_nope.shape[:3], k_rope.shape[2])
    k_rope = jnp.broadcast_to(k_rope[:, :, None], rope_shape)
    k = jnp.concatenate([k_nope, k_rope], axis=-1)
    q = constrain(q, ("batch", "length", "heads", "head"))
    k = constrain(k, ("batch", "length", "heads", "head"))

    # The kernels have one head width for keys and values: the narrower side is padded with zeros,
    # which add nothing. Of DeepSeek-V3 q and k are 192 wide, v is 128: [.., 128] -> [.., 192].
    value_width = v.shape[3]
    widest = max(q.shape[3], value_width)
    attention = dot_product(c, q.shape[3])
    out = attention(_pad_heads(q, widest), _pad_heads(k, widest), _pad_heads(v, widest), mask)
    return out[..., :value_width]


def _weight_absorption(
    c: AttentionConfig,
    to_keys: Projection,
    to_values: Projection,
    q: Float[Array, "B T N H"],
    latents: Float[Array, "B S latent"],
    k_rope: Float[Array, "B S rope"],
    mask: AttentionMask,
) -> Float[Array, "B T N value"]:
    """MLA weight absorption: multi-query attention, whose one key/value head is the latents.

        q_n · (c W_k,n) = (q_n W_k,nᵀ) · c,    Σ p (c W_v,n) = (Σ p c) W_v,n

    Source: DeepSeek-AI 2024 (DeepSeek-V2), arXiv:2405.04434, section 2.1.2.
    """
    kv_dim = latents.shape[2]
    w_key, _ = to_keys.weights((kv_dim,))
    w_value, _ = to_values.weights((kv_dim,))

    # c counts columns of the latent: [B, T, N, H], [c, N, H] -> [B, T, N, c]
    q_nope = einsum("BTNH,cNH->BTNc", q[..., : c.head_dim], w_key)
    q_rope = q[..., c.head_dim :]
    q_latent = jnp.concatenate([q_nope, q_rope], axis=-1)
    q_latent = constrain(q_latent, ("batch", "length", "heads", "head"))
    # [B, S, latent], [B, S, rope] -> [B, S, 1, latent + rope]
    k = jnp.concatenate([latents, k_rope], axis=-1)[:, :, None]

    # The scale is that of the heads' own width, not of the latents'.
    attention = dot_product(c, q.shape[3])
    attention = dataclasses.replace(
        attention, implementation=for_wide_heads(attention.implementation)
    )
    # The keys are the values too; the sums of their rotary columns are cut off.
    sums = attention(q_latent, k, k, mask)[..., :kv_dim]
    # v counts columns of a value: [B, T, N, c], [c, N, v] -> [B, T, N, v]
    return einsum("BTNc,cNv->BTNv", sums, w_value)


def _pad_heads(x: Float[Array, "B T heads width"], width: int) -> Float[Array, "B T heads padded"]:
    """Returns heads filled up with columns of zeros."""
    missing = width - x.shape[-1]
    if not missing:
        return x
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, missing)))

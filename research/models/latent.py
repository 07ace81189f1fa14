"""Multi-head latent attention: keys and values of all heads come from one narrow latent a token."""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.models import positions as positional
from research.models.attention import Context, append, attend, head_norm, project_out
from research.models.cache import LayerCache
from research.models.config import LayerConfig, ModelConfig
from research.models.layers import Projection
from research.parallel.rules import constrain


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
        k = Projection((c.num_heads, c.head_dim), ("latent", "heads", "head"), name="key", **options)(states)
        v = Projection((c.num_heads, latent.value_dim), ("latent", "heads", "head"), name="value", **options)(states)
        k = jnp.concatenate([k, jnp.broadcast_to(turned, (*k.shape[:3], latent.rope_dim))], axis=-1)
        q, k = (constrain(array, ("batch", "length", "heads", "head")) for array in (q, k))

        # The kernels know one head width: the narrower side is filled up with zeros, which add nothing.
        widest = max(width, latent.value_dim)
        scale = 1 / math.sqrt(width) if c.scale is None else c.scale
        scaled = dataclasses.replace(model, attention=dataclasses.replace(c, scale=scale))
        mask = dataclasses.replace(mask, window=self.layer.window)
        out = attend(scaled, _fill(q, widest), _fill(k, widest), _fill(v, widest), mask)
        return project_out(model)(out[..., : latent.value_dim]), cache


def _fill(x: Float[Array, "B T heads W"], width: int) -> Float[Array, "B T heads H"]:
    return x if x.shape[-1] == width else jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, width - x.shape[-1])))

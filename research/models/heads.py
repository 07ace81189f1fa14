"""Heads on the last hidden states beside the output projection."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from research.models.block import Block
from research.models.cache import LayerCache
from research.models.config import ModelConfig
from research.models.context import Context
from research.models.layers import ACTIVATIONS, Norm, Projection
from research.models.reports import LayerReport


class Transform(nn.Module):
    """norm(act(x W + b)), before the output projection of a masked language model.

    Source: Devlin et al. 2019 (BERT), arXiv:1810.04805, as released.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        c = self.config
        y = Projection(
            x.shape[-1:],
            ("embed", "mlp"),
            use_bias=c.head.transform_bias,
            stddev=c.init_stddev,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            name="projection",
        )(x)
        y = ACTIVATIONS[c.mlp.activation](y)
        return Norm(c.norm, param_dtype=c.param_dtype, name="norm")(y)


class Pooler(nn.Module):
    """tanh(x₀ W + b) of each row's first token, and the logits of the classes where there are any.

    Source: Devlin et al. 2019 (BERT), arXiv:1810.04805, section 3.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B D"], Float[Array, "B classes"] | None]:
        c = self.config
        options = {
            "use_bias": True,
            "stddev": c.init_stddev,
            "dtype": c.dtype,
            "param_dtype": c.param_dtype,
        }
        projection = Projection(x.shape[-1:], ("embed", "mlp"), name="projection", **options)
        pooled = jnp.tanh(projection(x[:, 0]))
        if not c.head.num_classes:
            return pooled, None
        classes = Projection((c.head.num_classes,), ("embed", "classes"), name="classes", **options)
        return pooled, classes(pooled)


class MTPModule(nn.Module):
    """One depth of multi-token prediction: block([norm(e); norm(h)] W), with e the embedding of the
    token that follows.

    Source: DeepSeek-AI 2024 (DeepSeek-V3), arXiv:2412.19437, section 2.2, equations 21 and 22;
    embedding and output projection are the model's. As in the released weights e comes before h,
    and h has passed the last norm.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        context: Context,
        cache: LayerCache | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, LayerReport]:
        """Returns the states, the cache with these tokens in it, and the block's router loss and
        expert load.
        """
        c = self.config
        embedded = Norm(c.norm, param_dtype=c.param_dtype, name="embed_norm")(embedded)
        hidden = Norm(c.norm, param_dtype=c.param_dtype, name="hidden_norm")(hidden)
        # [B, T, D], [B, T, D] -> [B, T, 2 D] -> [B, T, D]
        both = jnp.concatenate([embedded, hidden], axis=-1)
        projection = Projection(
            (c.embed_dim,),
            ("mlp", "embed"),
            stddev=c.init_stddev,
            dtype=c.dtype,
            param_dtype=c.param_dtype,
            name="projection",
        )
        x = projection(both)
        x, cache, report = Block(c, c.layers()[-1], name="block")(x, cache, context)
        return Norm(c.norm, param_dtype=c.param_dtype, name="final_norm")(x), cache, report


def shift_left(x: Shaped[Array, "B T"], by: int) -> Shaped[Array, "B T"]:
    """Returns each row shifted left: [1, 2, 3] by 1 -> [2, 3, 0]."""
    return jnp.pad(x, ((0, 0), (0, by)))[:, by:]

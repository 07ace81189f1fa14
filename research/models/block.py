"""One transformer block: attention and MLP around the residual stream."""

from collections.abc import Callable

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from research.models.attention import Attention, Context, CrossAttention
from research.models.cache import LayerCache
from research.models.config import LayerConfig, ModelConfig
from research.models.latent import LatentAttention
from research.models.layers import Norm
from research.models.mlp import Experts, Mlp
from research.models.reports import LayerReport, empty_report
from research.parallel.rules import constrain

Stream = Float[Array, "B T D"]


class Block(nn.Module):
    """Residual sublayers, normalized where `NormConfig.placement` says: attention, cross-attention,
    MLP or experts.

    Attributes:
      config: the model.
      layer: what this layer does otherwise.
    """

    config: ModelConfig
    layer: LayerConfig = LayerConfig()

    @nn.compact
    def __call__(
        self, x: Stream, cache: LayerCache | None, context: Context
    ) -> tuple[Stream, LayerCache | None, LayerReport]:
        """Returns the stream, the cache with these tokens in it, and what the experts tell beside
        their output.
        """
        c, report = self.config, empty_report()
        attention_class = Attention if c.attention.latent is None else LatentAttention

        def attend(x: Stream) -> Stream:
            nonlocal cache
            y, cache = attention_class(c, self.layer, name="attention")(x, context, cache)
            return y

        def read_encoder(x: Stream) -> Stream:
            nonlocal cache
            y, cache = CrossAttention(c, name="cross_attention")(x, context, cache)
            return y

        def feed_forward(x: Stream) -> Stream:
            nonlocal report
            if c.experts is None or not self.layer.experts:
                return Mlp(c, name="mlp")(x)
            y, report = Experts(c, name="mlp")(x, context.real())
            return y

        if c.norm.placement.startswith("parallel"):
            first = Norm(c.norm, param_dtype=c.param_dtype, name="attention_norm")(x)
            second = (
                first
                if c.norm.placement == "parallel"
                else Norm(c.norm, param_dtype=c.param_dtype, name="mlp_norm")(x)
            )
            y = attend(first) + feed_forward(second)
            x = x + self._drop(y, context, 0)
        else:
            x = self._sublayer("attention", x, attend, context, 0)
            if c.structure == "encoder_decoder":
                x = self._sublayer("cross_attention", x, read_encoder, context, 1)
            x = self._sublayer("mlp", x, feed_forward, context, 2)
        return constrain(x, ("batch", "length", "embed")), cache, report

    def _sublayer(
        self, name: str, x: Stream, f: Callable[[Stream], Stream], context: Context, index: int
    ) -> Stream:
        norm = self.config.norm
        reads = norm.reads_normalized and (name != "attention" or self.layer.attention_norm)
        y = f(
            Norm(norm, param_dtype=self.config.param_dtype, name=f"{name}_norm")(x) if reads else x
        )
        if norm.writes_normalized:
            y = Norm(norm, param_dtype=self.config.param_dtype, name=f"{name}_out_norm")(y)
        x = x + self._drop(y, context, index)
        return (
            Norm(norm, param_dtype=self.config.param_dtype, name=f"{name}_norm")(x)
            if norm.placement == "post"
            else x
        )

    def _drop(self, y: Stream, context: Context, index: int) -> Stream:
        if context.key is None or not self.config.dropout:
            return y
        drop = nn.Dropout(self.config.dropout, deterministic=False)
        return drop(y, rng=jax.random.fold_in(context.key, index))

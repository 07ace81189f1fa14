"""One transformer block: attention and MLP around the residual stream."""

from collections.abc import Callable

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from research.models.attention import Attention, CrossAttention
from research.models.cache import LayerCache
from research.models.config import LayerConfig, ModelConfig
from research.models.context import Context
from research.models.experts import Experts
from research.models.latent import LatentAttention
from research.models.layers import Norm
from research.models.mlp import Mlp
from research.models.reports import LayerReport, empty_report
from research.parallel.rules import constrain

Hidden = Float[Array, "B T D"]
# What a sublayer reads: tensor shards its width inside, and not its tokens.
_ALL_TOKENS = ("batch", "length", "embed")


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
        self, x: Hidden, cache: LayerCache | None, context: Context
    ) -> tuple[Hidden, LayerCache | None, LayerReport]:
        """Returns the hidden states, the cache with these tokens in it, and the layer's router loss
        and expert load.
        """
        c = self.config
        report = empty_report()
        attention_class = Attention if c.attention.latent is None else LatentAttention

        # Sublayers as functions of the hidden states alone, for `_residual`.
        def attention(x: Hidden) -> Hidden:
            nonlocal cache
            y, cache = attention_class(c, self.layer, name="attention")(x, context, cache)
            return y

        def cross_attention(x: Hidden) -> Hidden:
            nonlocal cache
            y, cache = CrossAttention(c, name="cross_attention")(x, context, cache)
            return y

        def feed_forward(x: Hidden) -> Hidden:
            nonlocal report
            if c.experts is None or not self.layer.experts:
                return Mlp(c, name="mlp")(x)
            y, report = Experts(c, name="mlp")(x, context.real())
            return y

        if c.norm.placement in ("parallel", "parallel_pair"):
            x = self._parallel(x, attention, feed_forward, context)
        else:
            x = self._residual("attention", x, attention, context, 0)
            if c.structure == "encoder_decoder":
                x = self._residual("cross_attention", x, cross_attention, context, 1)
            x = self._residual("mlp", x, feed_forward, context, 2)
        return constrain(x, c.hidden_axes), cache, report

    def _parallel(
        self,
        x: Hidden,
        attention: Callable[[Hidden], Hidden],
        feed_forward: Callable[[Hidden], Hidden],
        context: Context,
    ) -> Hidden:
        """Returns x + attention(norm(x)) + feed_forward(norm(x)), of one norm or of a norm each."""
        attention_input = self._norm("attention_norm", x)
        if self.config.norm.placement == "parallel":
            mlp_input = attention_input
        else:
            mlp_input = self._norm("mlp_norm", x)

        attention_input = constrain(attention_input, _ALL_TOKENS)
        mlp_input = constrain(mlp_input, _ALL_TOKENS)
        y = attention(attention_input) + feed_forward(mlp_input)
        y = constrain(y, self.config.hidden_axes)
        return x + self._dropout(y, context, 0)

    def _residual(
        self, name: str, x: Hidden, f: Callable[[Hidden], Hidden], context: Context, index: int
    ) -> Hidden:
        """Returns x + f(x), normalized where the config says.

        Args:
          name: of the sublayer, which begins the names of its norms.
          x: the hidden states.
          f: the sublayer.
          context: of the stack.
          index: of the sublayer, which makes its dropout key its own.
        """
        norm = self.config.norm
        y = x
        if norm.reads_normalized and (name != "attention" or self.layer.attention_norm):
            y = self._norm(f"{name}_norm", y)
        y = constrain(y, _ALL_TOKENS)
        # Where tensor shards tokens too, its devices' sums of this are scattered over them.
        y = constrain(f(y), self.config.hidden_axes)
        if norm.writes_normalized:
            y = self._norm(f"{name}_out_norm", y)

        x = x + self._dropout(y, context, index)
        if norm.placement == "post":
            x = self._norm(f"{name}_norm", x)
        return x

    def _norm(self, name: str, x: Hidden) -> Hidden:
        return Norm(self.config.norm, param_dtype=self.config.param_dtype, name=name)(x)

    def _dropout(self, y: Hidden, context: Context, index: int) -> Hidden:
        if context.key is None or not self.config.dropout:
            return y
        dropout = nn.Dropout(self.config.dropout, deterministic=False)
        return dropout(y, rng=jax.random.fold_in(context.key, index))

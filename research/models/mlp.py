"""The dense feed-forward sublayer."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.models.attention import residual_stddev
from research.models.config import MlpConfig, ModelConfig
from research.models.layers import ACTIVATIONS, Projection
from research.parallel.rules import constrain


def activate(
    config: MlpConfig, up: Float[Array, "*rows F"], gate: Float[Array, "*rows F"] | None
) -> Float[Array, "*rows F"]:
    """Returns act(up), or act(gate) ⊙ (up + offset) where gated, both clamped where the config says
    so.
    """
    act = ACTIVATIONS[config.activation]
    if gate is None:
        return act(up)

    if config.clamp is not None:
        gate = jnp.minimum(gate, config.clamp)
        up = jnp.clip(up, -config.clamp, config.clamp)
    factor = up + config.up_offset if config.up_offset else up
    return act(gate) * factor


class Mlp(nn.Module):
    """The feed-forward sublayer: act(x U) D, or (act(x G) ⊙ x U) D where gated.

    Attributes:
      config: the model.
      hidden_dim: width F; None is the config's.

    Source: Shazeer 2020, arXiv:2002.05202, equations 5 and 6.
    """

    config: ModelConfig
    hidden_dim: int | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        model = self.config
        c = model.mlp
        width = c.hidden_dim if self.hidden_dim is None else self.hidden_dim

        # [B, T, D] -> [B, T, F]
        up = self._projection("up", width, ("embed", "mlp"), model.init_stddev)(x)
        gate = None
        if c.gated:
            gate = self._projection("gate", width, ("embed", "mlp"), model.init_stddev)(x)
        hidden = activate(c, up, gate)
        hidden = constrain(hidden, ("batch", "length", "mlp"))

        # [B, T, F] -> [B, T, D]
        down = self._projection("down", x.shape[-1], ("mlp", "embed"), residual_stddev(model))
        return down(hidden)

    def _projection(
        self, name: str, features: int, names: tuple[str, ...], stddev: float
    ) -> Projection:
        return Projection(
            (features,),
            names,
            use_bias=self.config.mlp.bias,
            stddev=stddev,
            dtype=self.config.dtype,
            param_dtype=self.config.param_dtype,
            name=name,
        )

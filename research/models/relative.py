"""Relative positions of Transformer-XL: scores by distance that depend on the query."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.weights import Weight
from research.models.config import ModelConfig
from research.models.context import Context
from research.models.layers import Projection, parameter
from research.models.positions import sinusoidal
from research.parallel.parameter import Axes


class RelativeScores(nn.Module):
    """Scores by distance that depend on the query: (q + b) · R(t − s), with R the projected
    sinusoids of a distance.

    Returns q + a, the query of the scores by content, and the scores by distance as an attention
    bias, which takes [B, N, T, S]. Without a cache there is a score for each visible distance,
    which `relative_shift` moves to its key; the mask hides the rest.

    Source: Dai et al. 2019 (Transformer-XL), arXiv:1901.02860, section 3.3, where a and b are u and
        v, and appendix B.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, q: Float[Array, "B T N H"], context: Context, slots: int | None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
        model = self.config
        c = model.attention
        content_bias = self._query_bias("content").astype(q.dtype)[None, None]
        distance_bias = self._query_bias("distance").astype(q.dtype)[None, None]

        # All distances that a query can have to a key, the furthest key first:
        # causal, 3 keys -> [2, 1, 0]; both directions -> [2, 1, 0, -1, -2].
        num_keys = q.shape[1] if slots is None else max(slots, q.shape[1])
        causal = slots is None and context.mask.causal and context.mask.prefix is None
        last = 0 if causal else 1 - num_keys
        distances = jnp.arange(num_keys - 1, last - 1, -1)
        project = Projection(
            (c.num_heads, c.head_dim),
            ("embed", "heads", "head"),
            stddev=model.init_stddev,
            dtype=model.dtype,
            param_dtype=model.param_dtype,
            name="projection",
        )
        r = project(sinusoidal(distances, model.embed_dim))
        scale = 1 / math.sqrt(c.head_dim) if c.scale is None else c.scale
        r = r * jnp.asarray(scale, r.dtype)

        # x counts distances: [B, T, N, H], [x, N, H] -> [B, N, T, x]
        distance_query = q + distance_bias
        scores = jnp.einsum("btnh,xnh->bntx", distance_query, r, preferred_element_type=jnp.float32)
        # [B, N, T, x] -> [B, N, T, S]
        content_query = q + content_bias
        if slots is None:
            return content_query, relative_shift(scores)
        bias = _scores_of_slots(scores, context.positions, num_keys, slots)
        return content_query, bias

    def _query_bias(self, name: str) -> Weight:
        """Returns a learned bias of the queries, [N, H]."""
        c = self.config.attention
        zeros = nn.initializers.zeros
        axes = Axes(("heads", "head"), "bias")
        return parameter(
            self, name, zeros, (c.num_heads, c.head_dim), axes, self.config.param_dtype
        )


def relative_shift(scores: Float[Array, "B N T distances"]) -> Float[Array, "B N T T"]:
    """Returns y[t, s] = x[t, T − 1 − t + s], where x has it: the scores of distances T − 1, T − 2,
    … by key.

    Source: Dai et al. 2019, arXiv:1901.02860, appendix B.
    """
    *lead, length, width = scores.shape
    # A column more in front, and rows cut anew to the old width after the first T numbers: each row
    # starts one later than the row before. For T = 2, scores of the distances 1 and 0:
    # [[a, b], [c, d]] -> [0, a, b, 0, c, d] -> [[b, 0], [c, d]]
    padding = [(0, 0)] * len(lead) + [(0, 0), (1, 0)]
    padded = jnp.pad(scores, padding)
    flat = padded.reshape(*lead, length * (width + 1))
    shifted = flat[..., length:].reshape(*lead, length, width)
    return shifted[..., :length]


def _scores_of_slots(
    scores: Float[Array, "B N T distances"], positions: Int[Array, "B T"], num_keys: int, slots: int
) -> Float[Array, "B N T S"]:
    """Returns the score of each cache slot, whose distance is position − slot."""
    # Distance d is in column num_keys - 1 - d. Of 4 slots, a query at position 1 has the distances
    # [1, 0, -1, -2] -> columns [2, 3, 4, 5].
    slot_index = jnp.arange(slots)[None, None]
    columns = num_keys - 1 - positions[:, :, None] + slot_index
    # Padding may have any position: what it reads must exist.
    columns = jnp.clip(columns, 0, 2 * num_keys - 2)
    # [B, T, S] -> [B, N, T, S]
    columns = jnp.broadcast_to(columns[:, None], (*scores.shape[:3], slots))
    return jnp.take_along_axis(scores, columns, axis=-1)

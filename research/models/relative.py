"""Relative positions of Transformer-XL: scores by distance that depend on the query."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.weights import Weight
from research.models.config import ModelConfig
from research.models.context import Context
from research.models.layers import Projection, parameter
from research.models.positions import sinusoidal
from research.parallel.gradient_sums import in_float32, round_sum
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
        self, q: Float[Array, "B T N H"], context: Context
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T S"]]:
        model = self.config
        c = model.attention
        content_query = _add_bias(q, self._query_bias("content"))
        distance_query = _add_bias(q, self._query_bias("distance"))

        # All distances that a query can have to a key, the furthest key first:
        # causal, 3 keys -> [2, 1, 0]; both directions -> [2, 1, 0, -1, -2].
        num_keys = q.shape[1]
        slots = context.slots
        if slots is not None:
            num_keys = max(slots, num_keys)
        mask = context.mask
        causal = slots is None and mask.causal and mask.prefix is None
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
        waves = sinusoidal(distances, model.embed_dim)
        r = project(waves)
        scale = c.scale
        if scale is None:
            scale = 1 / math.sqrt(c.head_dim)
        r = r * jnp.asarray(scale, r.dtype)

        # [B, N, T, distances] -> [B, N, T, S]
        scores = _distance_scores(distance_query, r)
        if slots is None:
            return content_query, relative_shift(scores)
        bias = _scores_of_slots(scores, context.positions, num_keys, slots)
        return content_query, bias

    def _query_bias(self, name: str) -> Weight:
        """Returns a learned bias of the queries, [N, H]."""
        c = self.config.attention
        zeros = nn.initializers.zeros
        shape = (c.num_heads, c.head_dim)
        axes = Axes(("heads", "head"), "bias")
        return parameter(self, name, zeros, shape, axes, self.config.param_dtype)


def _add_bias(q: Float[Array, "B T N H"], bias: Float[Array, "N H"]) -> Float[Array, "B T N H"]:
    """Returns q + b, added in float32, as is the gradient of b over all queries."""
    wide_q = q.astype(jnp.float32)
    # [N, H] -> [1, 1, N, H]
    bias = in_float32(bias)
    total = wide_q + bias[None, None]
    return total.astype(q.dtype)


@jax.custom_vjp
def _distance_scores(
    q: Float[Array, "B T N H"], r: Float[Array, "distances N H"]
) -> Float[Array, "B N T distances"]:
    """Returns q · r in float32; the gradient of r, which all rows of a batch share, is summed in
    float32.
    """
    # x counts distances.
    return jnp.einsum("btnh,xnh->bntx", q, r, preferred_element_type=jnp.float32)


def _distance_scores_fwd(q: Array, r: Array) -> tuple[Array, tuple[Array, Array]]:
    return _distance_scores(q, r), (q, r)


def _distance_scores_bwd(
    saved: tuple[Array, Array], g: Float[Array, "B N T distances"]
) -> tuple[Array, Array]:
    q, r = saved
    wide_r = r.astype(g.dtype)
    dq = jnp.einsum("bntx,xnh->btnh", g, wide_r)
    wide_q = q.astype(g.dtype)
    dr = jnp.einsum("bntx,btnh->xnh", g, wide_q)
    dq = dq.astype(q.dtype)
    dr = round_sum(dr, r.dtype)
    return dq, dr


_distance_scores.defvjp(_distance_scores_fwd, _distance_scores_bwd)


def relative_shift(scores: Float[Array, "B N T distances"]) -> Float[Array, "B N T T"]:
    """Returns y[t, s] = x[t, T − 1 − t + s], where x has it: the scores of distances T − 1, T − 2,
    … by key.

    Source: Dai et al. 2019, arXiv:1901.02860, appendix B.
    """
    *lead, length, width = scores.shape
    # A column more in front, and rows cut anew to the old width after the first T numbers: each row
    # starts one later than the row before. For T = 2, scores of the distances 1 and 0:
    # [[a, b], [c, d]] -> [0, a, b, 0, c, d] -> [[b, 0], [c, d]]
    no_padding = (0, 0)
    padding = [no_padding] * len(lead) + [no_padding, (1, 0)]
    padded = jnp.pad(scores, padding)
    flat = padded.reshape(*lead, length * (width + 1))
    flat = flat[..., length:]
    shifted = flat.reshape(*lead, length, width)
    return shifted[..., :length]


def _scores_of_slots(
    scores: Float[Array, "B N T distances"], positions: Int[Array, "B T"], num_keys: int, slots: int
) -> Float[Array, "B N T S"]:
    """Returns the score of each cache slot, whose distance is position − slot."""
    # Distance d is in column num_keys - 1 - d. Of 4 slots, a query at position 1 has the distances
    # [1, 0, -1, -2] -> columns [2, 3, 4, 5].
    slot_index = jnp.arange(slots)
    slot_index = slot_index[None, None]
    columns = num_keys - 1 - positions[:, :, None] + slot_index
    # Padding may have any position: what it reads must exist.
    last_column = 2 * num_keys - 2
    columns = jnp.clip(columns, 0, last_column)
    # [B, T, S] -> [B, N, T, S]
    *lead, _ = scores.shape
    columns = columns[:, None]
    columns = jnp.broadcast_to(columns, (*lead, slots))
    return jnp.take_along_axis(scores, columns, axis=-1)

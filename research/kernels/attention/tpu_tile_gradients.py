"""The gradients of a tile of scores on TPU, of which those of q, k, v and the bias are made."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention.tpu_operands import bias_tile
from research.kernels.attention.tpu_tile import (
    Refs,
    ScoreConfig,
    TileRange,
    TileTokens,
    capped_products,
    dot,
    scores,
    tile_tokens,
)


class TileInputs(NamedTuple):
    """The blocks of a tile of queries and a block of keys."""

    q_TxH: Float[Array, "T H"]
    g_TxH: Float[Array, "T H"]
    k_SxH: Float[Array, "S H"]
    v_SxH: Float[Array, "S H"]
    lse_1xT: Float[Array, "1 T"]
    delta_1xT: Float[Array, "1 T"]


class TileGradients(NamedTuple):
    """The gradients of a tile.

    Attributes:
      weights_SxT: the attention weights, which take g to the gradient of v.
      dproducts_SxT: the gradient of q kᵀ, but for the scale.
      dscores_SxT: the gradient of the scores after the cap, which is that of the bias.
    """

    weights_SxT: Float[Array, "S T"]
    dproducts_SxT: Float[Array, "S T"]
    dscores_SxT: Float[Array, "S T"]


def load_tile(
    config: ScoreConfig, refs: Refs, queries: TileRange, keys: TileTokens, masked: bool
) -> TileInputs:
    """Returns the operands of a tile; past the ends, where VMEM holds anything, they are 0.

    Args:
      config: of the call.
      refs: the kernel's operands.
      queries: of the tile.
      keys: of the tile: all that are in VMEM.
      masked: whether the tile may go past an end.
    """
    # [T, H], [S, H] and [1, T] of one head
    rows = queries.in_block
    q_TxH = refs["q"][0, 0, rows, :]
    g_TxH = refs["g"][0, 0, rows, :]
    k_SxH = refs["k"][0, 0]
    v_SxH = refs["v"][0, 0]
    lse_1xT = refs["lse"][0, 0, :, rows]
    delta_1xT = refs["delta"][0, 0, :, rows]

    if masked and config.queries % queries.size:
        # The same tokens as a column and as a row: [T, 1] and [1, T]
        column = queries.start + jax.lax.broadcasted_iota(jnp.int32, (queries.size, 1), 0)
        row = queries.start + jax.lax.broadcasted_iota(jnp.int32, (1, queries.size), 1)
        q_TxH = _zero_unless(column < config.queries, q_TxH)
        g_TxH = _zero_unless(column < config.queries, g_TxH)
        lse_1xT = _zero_unless(row < config.queries, lse_1xT)
        delta_1xT = _zero_unless(row < config.queries, delta_1xT)

    if masked and config.keys % keys.index.shape[0]:
        is_key = keys.index < config.keys
        k_SxH = _zero_unless(is_key, k_SxH)
        v_SxH = _zero_unless(is_key, v_SxH)
    return TileInputs(q_TxH, g_TxH, k_SxH, v_SxH, lse_1xT, delta_1xT)


def _zero_unless(condition: Array, x: Array) -> Array:
    return jnp.where(condition, x, jnp.zeros_like(x))


def tile_gradients(
    config: ScoreConfig,
    refs: Refs,
    tile: TileInputs,
    queries: TileRange,
    keys: TileTokens,
    masked: bool,
) -> TileGradients:
    """Returns the gradients of a tile, [keys, queries]; arguments as of `load_tile`."""
    # The scores once more, as in the forward pass: [S, H] and [T, H] -> [S, T]
    products_SxT = dot(tile.k_SxH, tile.q_TxH, contract=(1, 1))
    query_tokens = tile_tokens(refs, "q", queries, axis=1)
    capped_SxT, cap_derivative = capped_products(config, products_SxT)
    bias = bias_tile(refs, queries.in_block, slice(None))
    if bias is not None:
        bias = bias.T
    scores_SxT = scores(config, refs, capped_SxT, query_tokens, keys, bias, masked)

    # Of a softmax: dscores = weights · (dweights − Σ_s weights · dweights), where the sum is delta.
    weights_SxT = jnp.exp2(scores_SxT - tile.lse_1xT)
    dweights_SxT = dot(tile.v_SxH, tile.g_TxH, contract=(1, 1))
    dscores_SxT = weights_SxT * (dweights_SxT - tile.delta_1xT)

    # The cap is the only term between products and scores that is no constant or sum.
    dproducts_SxT = dscores_SxT
    if cap_derivative is not None:
        dproducts_SxT = dscores_SxT * cap_derivative
    return TileGradients(weights_SxT, dproducts_SxT, dscores_SxT)

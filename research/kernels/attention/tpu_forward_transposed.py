"""The forward kernel on TPU where matrix units are 256 wide: tiles of scores are [keys, queries].

A head of 128 columns fills half of such a unit when it is the operand that is held in it; here it
is the operand that streams through. Maximum and denominator of a query are in a lane, which makes
them cheap. The products q kᵀ of the next tile are made while the exponentials of this one are.
"""

from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from research.kernels.attention.tpu_operands import refs_by_name
from research.kernels.attention.tpu_plan import BlockSizes, Visits, flat_index, visit_tiles
from research.kernels.attention.tpu_softmax import (
    OnlineSoftmax,
    add_sink,
    tile_scores,
    zero_past_end,
)
from research.kernels.attention.tpu_tile import (
    HIDDEN,
    Refs,
    ScoreConfig,
    TileRange,
    TileTokens,
    dot,
    tile_tokens,
)


def scratch(blocks: BlockSizes, width: int) -> list[Any]:
    """Returns the memory of `OnlineSoftmax`, and a tile of products q kᵀ."""
    queries = blocks.queries
    row = pltpu.VMEM((1, queries), jnp.float32)
    accumulator = pltpu.VMEM((width, queries), jnp.float32)
    products = pltpu.VMEM((blocks.keys, queries), jnp.float32)
    return [row, row, accumulator, products]


def kernel(
    config: ScoreConfig,
    blocks: BlockSizes,
    tiles_per_chunk: int,
    plan_rows: int,
    names: tuple[str, ...],
    counts_ref: Any,
    order_ref: Any,
    *rest: Any,
) -> None:
    """Computes a block of queries against a chunk of resident keys.

    Args:
      config, blocks: of the call.
      tiles_per_chunk: tiles of keys in a chunk.
      plan_rows: rows of the batch that differ in the plan.
      names: of the operands.
      counts_ref, order_ref: the plan.
      rest: references to operands, results and scratch.
    """
    *inputs, out_ref, lse_ref, max_ref, denominator_ref, accumulator_ref, products_ref = rest
    softmax = OnlineSoftmax(max_ref, denominator_ref, accumulator_ref)
    row, head, block, chunk = map(pl.program_id, range(4))
    _, _, blocks_of_queries, chunks = map(pl.num_programs, range(4))
    refs = refs_by_name(names, inputs, row, head)

    entry = flat_index((row, block, chunk), (plan_rows, blocks_of_queries, chunks))
    visits = Visits(counts_ref, order_ref, entry, tiles_per_chunk, blocks.keys)
    unmasked, visited = visits.counts()
    resident = tiles_per_chunk * blocks.keys

    pl.when(chunk == 0)(softmax.reset)

    # q kᵀ of a tile waits in VMEM until its turn: [S, H] and [T, H] -> [S, T]
    def multiply(visit: Any) -> None:
        rows = pl.ds(visits.offset(visit), blocks.keys)
        k_SxH = refs["k"][0, 0, rows, :]
        q_TxH = refs["q"][0, 0]
        products_ref[...] = dot(k_SxH, q_TxH, contract=(1, 1))

    block_range = TileRange(block * blocks.queries, 0, blocks.queries)
    queries = tile_tokens(refs, "q", block_range, axis=1)

    def add_tile(visit: Any, masked: bool) -> None:
        products_SxT = products_ref[...]
        offset = visits.offset(visit)
        # The last products are made twice: a branch would keep the compiler from interleaving the
        # products of the next tile with the exponentials of this one.
        next_visit = jnp.minimum(visit + 1, visited - 1)
        multiply(next_visit)
        start = chunk * resident + offset
        keys = TileRange(start, offset, blocks.keys)
        _add_tile(config, refs, queries, keys, products_SxT, masked, softmax)

    pl.when(visited > 0)(lambda: multiply(0))
    visit_tiles(0, unmasked, visited, add_tile)

    @pl.when(chunk == chunks - 1)
    def _finish() -> None:
        _store(config, refs, softmax, out_ref, lse_ref)


def _add_tile(
    config: ScoreConfig,
    refs: Refs,
    queries: TileTokens,
    keys: TileRange,
    products_SxT: Float[Array, "S T"],
    masked: bool,
    softmax: OnlineSoftmax,
) -> None:
    """Adds a tile of keys to the running maximum, denominator and sum of values."""
    values_SxH = refs["v"][0, 0, keys.in_block, :]
    scores_SxT, factor = tile_scores(config, refs, products_SxT, queries, keys, masked, key_axis=0)
    values_SxH = zero_past_end(config, values_SxH, keys, masked)

    # The maximum of each query: [S, T] -> [1, T]
    old_max = softmax.max_ref[...]
    tile_max = scores_SxT.max(axis=0, keepdims=True)
    new_max = jnp.maximum(old_max, tile_max * factor)
    scaled_SxT = scores_SxT * factor
    weights_SxT = jnp.exp2(scaled_SxT - new_max)
    rescale = jnp.exp2(old_max - new_max)

    denominator = softmax.denominator_ref[...]
    rescaled = denominator * rescale
    weight_sums = weights_SxT.sum(axis=0, keepdims=True)
    softmax.denominator_ref[...] = rescaled + weight_sums
    softmax.max_ref[...] = new_max

    # [S, H] and [S, T] -> [H, T]
    weights_SxT = weights_SxT.astype(values_SxH.dtype)
    product_HxT = dot(values_SxH, weights_SxT, contract=(0, 0))
    accumulator_HxT = softmax.accumulator_ref[...]
    rescaled_HxT = accumulator_HxT * rescale
    softmax.accumulator_ref[...] = rescaled_HxT + product_HxT


def _store(
    config: ScoreConfig, refs: Refs, softmax: OnlineSoftmax, out_ref: Any, lse_ref: Any
) -> None:
    """Writes the results of a block of queries, after its last tile."""
    row_max = softmax.max_ref[...]
    denominator = softmax.denominator_ref[...]
    rescale: Any = 1.0
    if "sinks" in config.given:
        sinks_ref = refs["sinks"]
        row_max, denominator, rescale = add_sink(sinks_ref, row_max, denominator)

    # A query that attends to no key has the denominator 0 and gets zeros.
    attends = denominator > 0
    accumulator_HxT = softmax.accumulator_ref[...]
    divisor = jnp.where(attends, denominator, 1.0)
    factor = rescale / divisor
    out_HxT = accumulator_HxT * factor
    # [H, T] -> [T, H]
    out_TxH = out_HxT.T
    out_ref[0, 0] = out_TxH.astype(out_ref.dtype)

    # [1, T]
    lse = row_max + jnp.log2(denominator)
    lse = jnp.where(attends, lse, -HIDDEN)
    lse_ref[0, 0] = lse

"""The forward pass on TPU: a block of queries against the tiles of resident keys that it attends
to.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from research.kernels.attention import tpu_forward_transposed as transposed
from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.kernels.attention.tpu_operands import Operands, refs_by_name
from research.kernels.attention.tpu_plan import (
    BlockSizes,
    TilePlan,
    Visits,
    cover,
    flat_index,
    plan_tiles,
    tile_visibility,
    visit_tiles,
)
from research.kernels.attention.tpu_softmax import (
    OnlineSoftmax,
    add_sink,
    tile_scores,
    zero_past_end,
)
from research.kernels.attention.tpu_tile import (
    HIDDEN,
    LANES,
    Refs,
    ScoreConfig,
    TileRange,
    TileTokens,
    dot,
    repeat_lanes,
    tile_tokens,
)

VMEM_LIMIT = 100 * 2**20


def _tiles_per_chunk(keys: int, blocks: BlockSizes) -> int:
    """Returns how many tiles of keys are resident in VMEM."""
    most = blocks.resident // blocks.keys
    return min(most, cover(keys, blocks.keys))


def forward_plan(mask: AttentionMask, queries: int, keys: int, blocks: BlockSizes) -> TilePlan:
    """Returns the tiles of keys that each block of queries visits, in each resident chunk."""
    any_visible, all_visible = tile_visibility(mask, queries, keys, blocks)
    return plan_tiles(any_visible, all_visible, _tiles_per_chunk(keys, blocks))


def forward(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: AttentionMask,
    terms: ScoreTerms,
    blocks: BlockSizes,
    interpret: Any,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N 1 T"]]:
    """Returns attention and lse, the logsumexp of each row of scores to base 2, sink included.

    lse is `-HIDDEN`, a huge number, where there is no sink and a query attends to no key.

    Source: Dao 2023 (FlashAttention-2), arXiv:2307.08691, algorithm 1, with the tiles that need no
        mask first.
    """
    batch, heads, queries, width = q.shape
    keys = k.shape[2]
    config = ScoreConfig.of(mask, terms, queries, keys)
    plan = forward_plan(mask, queries, keys, blocks)
    tiles_per_chunk = _tiles_per_chunk(keys, blocks)
    resident = tiles_per_chunk * blocks.keys
    operands = _operands(q, k, v, mask, terms, blocks, resident)

    # One head of one row of the batch at a time: [B, N, T, H] and [B, N, 1, T]
    out_block = (1, 1, blocks.queries, width)
    lse_block = (1, 1, 1, blocks.queries)
    kernel = transposed.kernel if blocks.transposed else _kernel
    scratch = transposed.scratch if blocks.transposed else _scratch
    grid_spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(batch, heads, cover(queries, blocks.queries), cover(keys, resident)),
        in_specs=operands.specs,
        out_specs=(
            operands.spec(out_block, lambda b, n, i, c: (b, n, i, 0)),
            operands.spec(lse_block, lambda b, n, i, c: (b, n, 0, i)),
        ),
        scratch_shapes=scratch(blocks, width),
    )
    call = pl.pallas_call(
        functools.partial(kernel, config, blocks, tiles_per_chunk, plan.rows, operands.names),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, v.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32),
        ),
        grid_spec=grid_spec,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        name="tessera_attention_forward",
        interpret=interpret,
    )
    out, lse = call(plan.counts, plan.order, *operands.arrays)
    return out, lse


def _operands(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: AttentionMask,
    terms: ScoreTerms,
    blocks: BlockSizes,
    resident: int,
) -> Operands:
    """Returns the operands, by row b, head n, block of queries i and chunk of keys c."""
    _, heads, _, width = q.shape
    group = heads // k.shape[1]
    q_block = (1, 1, blocks.queries, width)
    kv_block = (1, 1, resident, width)

    def q_index_map(b, n, i, c):
        return b, n, i, 0

    # With 4 query heads per key/value head, query heads 4:8 read key/value head 1.
    def kv_index_map(b, n, i, c):
        return b, jax.lax.div(n, group), c, 0

    operands = Operands.of(mask, terms, grid_axes=range(4))
    operands.add("q", q, q_block, q_index_map)
    operands.add("k", k, kv_block, kv_index_map)
    operands.add("v", v, kv_block, kv_index_map)

    def q_block_index(b, n, i, c):
        return i

    def kv_block_index(b, n, i, c):
        return c

    def bias_index_map(b, n, i, c):
        return b, n, i, c

    operands.add_tokens("q", blocks.queries, q_block_index)
    operands.add_tokens("kv", resident, kv_block_index)
    operands.add_bias(blocks.queries, resident, bias_index_map)
    return operands


def _scratch(blocks: BlockSizes, width: int) -> list[Any]:
    """Returns the memory of `OnlineSoftmax`; a maximum is the same in all lanes of its row."""
    row_value = pltpu.VMEM((blocks.queries, LANES), jnp.float32)
    accumulator = pltpu.VMEM((blocks.queries, width), jnp.float32)
    return [row_value, row_value, accumulator]


def _kernel(
    config: ScoreConfig,
    blocks: BlockSizes,
    tiles_per_chunk: int,
    plan_rows: int,
    names: tuple[str, ...],
    counts_ref: Any,
    order_ref: Any,
    *rest: Any,
) -> None:
    """Computes a block of queries against a chunk of keys: arguments as of the other layout."""
    *inputs, out_ref, lse_ref, max_ref, denominator_ref, accumulator_ref = rest
    softmax = OnlineSoftmax(max_ref, denominator_ref, accumulator_ref)
    row, head, block, chunk = map(pl.program_id, range(4))
    _, _, blocks_of_queries, chunks = map(pl.num_programs, range(4))
    refs = refs_by_name(names, inputs, row, head)

    # The plan has an entry for each row, block of queries and chunk of keys.
    place = (row, block, chunk)
    plan_shape = (plan_rows, blocks_of_queries, chunks)
    entry = flat_index(place, plan_shape)
    visits = Visits(counts_ref, order_ref, entry, tiles_per_chunk, blocks.keys)

    resident = tiles_per_chunk * blocks.keys

    pl.when(chunk == 0)(softmax.reset)
    first_query = block * blocks.queries
    block_range = TileRange(first_query, 0, blocks.queries)
    queries = tile_tokens(refs, "q", block_range, axis=0)

    def add_tile(visit: Any, masked: bool) -> None:
        offset = visits.offset(visit)
        start = chunk * resident + offset
        keys = TileRange(start, offset, blocks.keys)
        _add_tile(config, refs, queries, keys, masked, softmax)

    def add_two(pair: Any, _: None) -> None:
        for second in range(2):
            visit = 2 * pair + second
            add_tile(visit, False)

    # In pairs, so that the matrix units take up the second tile while the vector units finish the
    # first. With 5 tiles without mask of 7: pairs (0, 1) and (2, 3), then 4, then 5 and 6 masked.
    unmasked, visited = visits.counts()
    pairs = jax.lax.shift_right_logical(unmasked, 1)
    jax.lax.fori_loop(0, pairs, add_two, None)
    even = unmasked & -2
    visit_tiles(even, unmasked, visited, add_tile)

    @pl.when(chunk == chunks - 1)
    def _finish() -> None:
        _store(config, refs, softmax, out_ref, lse_ref)


def _add_tile(
    config: ScoreConfig,
    refs: Refs,
    queries: TileTokens,
    keys: TileRange,
    masked: bool,
    softmax: OnlineSoftmax,
) -> None:
    """Adds a tile of keys to the running maximum, denominator and sum of values."""
    k_SxH = refs["k"][0, 0, keys.in_block, :]
    values_SxH = refs["v"][0, 0, keys.in_block, :]
    q_TxH = refs["q"][0, 0]
    products_TxS = dot(q_TxH, k_SxH, contract=(1, 1))
    scores_TxS, factor = tile_scores(config, refs, products_TxS, queries, keys, masked, key_axis=1)
    values_SxH = zero_past_end(config, values_SxH, keys, masked)

    # A maximum is the same in all 128 lanes of its row: [T, 128]
    old_max = softmax.max_ref[...]
    tile_max = scores_TxS.max(axis=1, keepdims=True)
    new_max = jnp.maximum(old_max, tile_max * factor)
    scaled_TxS = scores_TxS * factor
    new_max_TxS = repeat_lanes(new_max, keys.size)
    weights_TxS = jnp.exp2(scaled_TxS - new_max_TxS)
    rescale = jnp.exp2(old_max - new_max)

    # The lanes of a denominator are added up at the end: [T, 512] -> [T, 128]
    lane_sums = 0
    for start in range(0, keys.size, LANES):
        end = start + LANES
        lane_sums = lane_sums + weights_TxS[:, start:end]
    denominator = softmax.denominator_ref[...]
    rescaled = denominator * rescale
    softmax.denominator_ref[...] = rescaled + lane_sums
    softmax.max_ref[...] = new_max

    # [T, S] and [S, H] -> [T, H]
    weights_TxS = weights_TxS.astype(values_SxH.dtype)
    product_TxH = dot(weights_TxS, values_SxH, contract=(1, 0))
    accumulator_TxH = softmax.accumulator_ref[...]
    width = product_TxH.shape[1]
    rescale_TxH = repeat_lanes(rescale, width)
    rescaled_TxH = accumulator_TxH * rescale_TxH
    softmax.accumulator_ref[...] = rescaled_TxH + product_TxH


def _store(
    config: ScoreConfig, refs: Refs, softmax: OnlineSoftmax, out_ref: Any, lse_ref: Any
) -> None:
    """Writes the results of a block of queries, after its last tile."""
    row_max = softmax.max_ref[...]
    accumulator_TxH = softmax.accumulator_ref[...]
    width = accumulator_TxH.shape[1]

    # [T, 128] -> [T, 1] -> [T, 128]
    lane_sums = softmax.denominator_ref[...]
    denominator = lane_sums.sum(axis=1, keepdims=True)
    denominator = jnp.broadcast_to(denominator, row_max.shape)
    if "sinks" in config.given:
        sinks_ref = refs["sinks"]
        row_max, denominator, rescale = add_sink(sinks_ref, row_max, denominator)
        rescale_TxH = repeat_lanes(rescale, width)
        accumulator_TxH = accumulator_TxH * rescale_TxH

    # A query that attends to no key has the denominator 0 and gets zeros.
    attends = denominator > 0
    divisor = jnp.where(attends, denominator, 1.0)
    divisor_TxH = repeat_lanes(divisor, width)
    out_TxH = accumulator_TxH / divisor_TxH
    out_ref[0, 0] = out_TxH.astype(out_ref.dtype)

    # [T, 128] -> [1, T]
    lse = row_max + jnp.log2(denominator)
    lse = jnp.where(attends, lse, -HIDDEN)
    lse_128xT = lse.T
    lse_ref[0, 0] = lse_128xT[:1]

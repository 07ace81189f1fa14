"""The backward pass on TPU: a block of keys against the tiles of resident queries that attend to
it, in five products per tile.

Tiles are [keys, queries], so that what belongs to a query is in a lane.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.kernels.attention.tpu_forward import VMEM_LIMIT
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
from research.kernels.attention.tpu_tile import (
    Refs,
    ScoreConfig,
    TileRange,
    TileTokens,
    dot,
    tile_tokens,
)
from research.kernels.attention.tpu_tile_gradients import load_tile, tile_gradients


@dataclasses.dataclass(frozen=True)
class BackwardInputs:
    """What gradients are computed from.

    Attributes:
      q, k, v: of the call.
      g: the gradient of the attention's output.
      lse: logsumexp of each row of scores to base 2, of the forward pass.
      delta: Σ_h g · out of each query.
    """

    q: Float[Array, "B N T H"]
    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]
    g: Float[Array, "B N T H"]
    lse: Float[Array, "B N 1 T"]
    delta: Float[Array, "B N 1 T"]

    def of_queries(self, chunk: slice) -> "BackwardInputs":
        """Returns the inputs of some of the queries."""
        return dataclasses.replace(
            self,
            q=self.q[:, :, chunk],
            g=self.g[:, :, chunk],
            lse=self.lse[..., chunk],
            delta=self.delta[..., chunk],
        )


def backward_plans(
    mask: AttentionMask, queries: int, keys: int, blocks: BlockSizes
) -> list[TilePlan]:
    """Returns the tiles of queries that each block of keys visits, one plan per resident chunk
    of queries.
    """
    visibility = tile_visibility(mask, queries, keys, blocks)
    # [B, blocks of queries, blocks of keys] -> [B, blocks of keys, blocks of queries]
    any_visible, all_visible = (tiles.swapaxes(1, 2) for tiles in visibility)

    q_blocks = any_visible.shape[2]
    most_tiles = blocks.resident // blocks.queries
    plans = []
    for start in range(0, q_blocks, most_tiles):
        chunk = slice(start, start + most_tiles)
        any_in_chunk = any_visible[..., chunk]
        all_in_chunk = all_visible[..., chunk]
        plan = plan_tiles(any_in_chunk, all_in_chunk, any_in_chunk.shape[2])
        plans.append(plan)
    return plans


def backward(
    inputs: BackwardInputs,
    mask: AttentionMask,
    terms: ScoreTerms,
    blocks: BlockSizes,
    interpret: Any,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Returns the gradients of q, k and v.

    Source: Dao 2023 (FlashAttention-2), arXiv:2307.08691, algorithm 2; the gradient of q is summed
        in VMEM.
    """
    queries = inputs.q.shape[2]
    keys = inputs.k.shape[2]
    config = ScoreConfig.of(mask, terms, queries, keys)

    dqs = []
    dk: Any = None
    dv: Any = None
    plans = backward_plans(mask, queries, keys, blocks)
    for index, plan in enumerate(plans):
        # 40,000 queries, of which 16,384 are resident: chunks 0:16384, 16384:32768, 32768:40000
        start = index * blocks.resident
        stop = min(start + blocks.resident, queries)
        chunk = slice(start, stop)
        dq, dk_of_chunk, dv_of_chunk = _chunk_gradients(
            inputs.of_queries(chunk),
            _mask_of_queries(mask, chunk),
            _terms_of_queries(terms, chunk),
            config,
            blocks,
            plan,
            start,
            interpret,
        )
        dqs.append(dq)
        dk = dk_of_chunk if dk is None else dk + dk_of_chunk
        dv = dv_of_chunk if dv is None else dv + dv_of_chunk

        # One chunk after the other, so that memory holds the gradients of one at a time.
        ordered = jax.lax.optimization_barrier((inputs.q, inputs.g, dk, dv))
        q, g, dk, dv = ordered
        inputs = dataclasses.replace(inputs, q=q, g=g)

    dq = jnp.concatenate(dqs, axis=2)
    dk = _sum_heads(dk, inputs.k)
    dv = _sum_heads(dv, inputs.v)
    return dq, dk, dv


def _sum_heads(
    gradient: Float[Array, "B N S H"], operand: Float[Array, "B K S H"]
) -> Float[Array, "B K S H"]:
    """Returns the gradient of k or v: a sum over the query heads of each key/value head."""
    batch, kv_heads, keys, width = operand.shape
    if gradient.shape[1] != kv_heads:
        # [B, N, S, H] -> [B, K, G, S, H] -> [B, K, S, H]
        grouped = gradient.reshape(batch, kv_heads, -1, keys, width)
        gradient = grouped.sum(axis=2)
    return gradient.astype(operand.dtype)


def _mask_of_queries(mask: AttentionMask, chunk: slice) -> AttentionMask:
    positions = mask.q_positions
    if positions is not None:
        positions = positions[:, chunk]
    segments = mask.q_segments
    if segments is not None:
        segments = segments[:, chunk]
    return dataclasses.replace(mask, q_positions=positions, q_segments=segments)


def _terms_of_queries(terms: ScoreTerms, chunk: slice) -> ScoreTerms:
    bias = terms.bias
    if bias is None or bias.shape[2] == 1:
        return terms
    return dataclasses.replace(terms, bias=bias[:, :, chunk])


def _operands(
    inputs: BackwardInputs,
    mask: AttentionMask,
    terms: ScoreTerms,
    blocks: BlockSizes,
    resident: int,
) -> Operands:
    """Returns the operands, by row b, head n and block of keys j."""
    _, heads, _, width = inputs.q.shape
    group = heads // inputs.k.shape[1]

    # All resident queries of a head: q and g are [B, N, T, H], lse and delta [B, N, 1, T].
    q_block = (1, 1, resident, width)
    row_block = (1, 1, 1, resident)
    kv_block = (1, 1, blocks.keys, width)

    def head_index_map(b, n, j):
        return b, n, 0, 0

    # With 4 query heads per key/value head, query heads 4:8 read key/value head 1.
    def kv_index_map(b, n, j):
        return b, jax.lax.div(n, group), j, 0

    operands = Operands.of(mask, terms, grid_axes=range(3))
    operands.add("q", inputs.q, q_block, head_index_map)
    operands.add("g", inputs.g, q_block, head_index_map)
    operands.add("lse", inputs.lse, row_block, head_index_map)
    operands.add("delta", inputs.delta, row_block, head_index_map)
    operands.add("k", inputs.k, kv_block, kv_index_map)
    operands.add("v", inputs.v, kv_block, kv_index_map)
    operands.add_tokens("q", resident, lambda b, n, j: 0)
    operands.add_tokens("kv", blocks.keys, lambda b, n, j: j)
    operands.add_bias(resident, blocks.keys, lambda b, n, j: (b, n, 0, j))
    return operands


def _chunk_gradients(
    inputs: BackwardInputs,
    mask: AttentionMask,
    terms: ScoreTerms,
    config: ScoreConfig,
    blocks: BlockSizes,
    plan: TilePlan,
    start: int,
    interpret: Any,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N S H"], Float[Array, "B N S H"]]:
    """Runs the kernel for a chunk of queries; the gradients of k and v are one per query head.

    Args:
      inputs, mask, terms: of the chunk.
      config: of the whole call.
      blocks: sizes of a tile.
      plan: of the chunk.
      start: the index of the chunk's first query in the sequence.
      interpret: of `pallas_call`.
    """
    batch, heads, queries, width = inputs.q.shape
    _, kv_heads, keys, _ = inputs.k.shape
    tiles_per_chunk = cover(queries, blocks.queries)
    resident = tiles_per_chunk * blocks.queries
    operands = _operands(inputs, mask, terms, blocks, resident)

    # Several heads or chunks of queries add to the gradient of a key: they are summed in float32.
    is_sum = heads != kv_heads or config.queries > blocks.resident
    dkv_dtype = jnp.float32 if is_sum else inputs.v.dtype
    dq_shape = jax.ShapeDtypeStruct(inputs.q.shape, inputs.q.dtype)
    dkv_shape = jax.ShapeDtypeStruct((batch, heads, keys, width), dkv_dtype)
    dq_block = (1, 1, resident, width)
    dkv_block = (1, 1, blocks.keys, width)
    dq_spec = operands.spec(dq_block, lambda b, n, j: (b, n, 0, 0))
    dkv_spec = operands.spec(dkv_block, lambda b, n, j: (b, n, j, 0))

    call = pl.pallas_call(
        functools.partial(
            _kernel, config, blocks, tiles_per_chunk, plan.rows, start, operands.names
        ),
        out_shape=(dq_shape, dkv_shape, dkv_shape),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, cover(keys, blocks.keys)),
            in_specs=operands.specs,
            out_specs=(dq_spec, dkv_spec, dkv_spec),
            scratch_shapes=[
                pltpu.VMEM((resident, width), jnp.float32),
                pltpu.VMEM((blocks.keys, width), jnp.float32),
                pltpu.VMEM((blocks.keys, width), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name="tessera_attention_backward",
        interpret=interpret,
    )
    return tuple(call(plan.counts, plan.order, *operands.arrays))


class _Sums(NamedTuple):
    """References to the gradients in VMEM: of all resident queries, and of a block of keys."""

    dq_ref: Any
    dk_ref: Any
    dv_ref: Any


def _kernel(
    config: ScoreConfig,
    blocks: BlockSizes,
    tiles_per_chunk: int,
    plan_rows: int,
    start: int,
    names: tuple[str, ...],
    counts_ref: Any,
    order_ref: Any,
    *rest: Any,
) -> None:
    """Computes the gradients of a block of keys, and adds to those of the resident queries.

    Args:
      config, blocks: of the call.
      tiles_per_chunk: tiles of queries in a chunk.
      plan_rows: rows of the batch that differ in the plan.
      start: the index of the chunk's first query in the sequence.
      names: of the operands.
      counts_ref, order_ref: the plan.
      rest: references to operands, results and scratch.
    """
    *inputs, dq_ref, dk_ref, dv_ref, dq_sum_ref, dk_sum_ref, dv_sum_ref = rest
    sums = _Sums(dq_sum_ref, dk_sum_ref, dv_sum_ref)
    row, head, block = (pl.program_id(axis) for axis in range(3))
    blocks_of_keys = pl.num_programs(2)
    refs = refs_by_name(names, inputs, row, head)

    entry = flat_index((row, block), (plan_rows, blocks_of_keys))
    visits = Visits(counts_ref, order_ref, entry, tiles_per_chunk, blocks.queries)

    # The gradient of q is complete when all blocks of keys have added to it.
    @pl.when(block == 0)
    def _start() -> None:
        dq_sum_ref[...] = jnp.zeros_like(dq_sum_ref)

    dk_sum_ref[...] = jnp.zeros_like(dk_sum_ref)
    dv_sum_ref[...] = jnp.zeros_like(dv_sum_ref)
    block_range = TileRange(block * blocks.keys, 0, blocks.keys)
    keys = tile_tokens(refs, "kv", block_range, axis=0)

    def add_tile(visit: Any, masked: bool) -> None:
        offset = visits.offset(visit)
        queries = TileRange(start + offset, offset, blocks.queries)
        _add_tile(config, refs, queries, keys, masked, sums)

    unmasked, visited = visits.counts()
    visit_tiles(0, unmasked, visited, add_tile)

    # Scores are scale · q kᵀ: q and k have the factor in their gradients, v does not.
    dk = dk_sum_ref[...] * config.scale
    dk_ref[0, 0] = dk.astype(dk_ref.dtype)
    dv_ref[0, 0] = dv_sum_ref[...].astype(dv_ref.dtype)

    @pl.when(block == blocks_of_keys - 1)
    def _finish() -> None:
        dq = dq_sum_ref[...] * config.scale
        dq_ref[0, 0] = dq.astype(dq_ref.dtype)


def _add_tile(
    config: ScoreConfig, refs: Refs, queries: TileRange, keys: TileTokens, masked: bool, sums: _Sums
) -> None:
    """Adds a tile of queries to the three gradients."""
    tile = load_tile(config, refs, queries, keys, masked)
    gradients = tile_gradients(config, refs, tile, queries, keys, masked)
    weights_SxT = gradients.weights_SxT.astype(tile.g_TxH.dtype)
    dproducts_SxT = gradients.dproducts_SxT.astype(tile.k_SxH.dtype)

    # [S, T] and [T, H] -> [S, H], or [S, T] and [S, H] -> [T, H]
    sums.dv_ref[...] += dot(weights_SxT, tile.g_TxH, contract=(1, 0))
    sums.dk_ref[...] += dot(dproducts_SxT, tile.q_TxH, contract=(1, 0))
    dq_TxH = dot(dproducts_SxT, tile.k_SxH, contract=(0, 0))
    sums.dq_ref[queries.in_block, :] += dq_TxH

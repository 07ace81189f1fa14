"""The gradient of the bias on TPU: every tile of scores once more, summed over the axes that the
bias broadcasts.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.kernels.attention.tpu_backward import BackwardInputs
from research.kernels.attention.tpu_forward import VMEM_LIMIT
from research.kernels.attention.tpu_operands import Operands, refs_by_name
from research.kernels.attention.tpu_plan import BlockSizes, cover, flat_index, tile_visibility
from research.kernels.attention.tpu_tile import LANES, ScoreConfig, TileRange, tile_tokens
from research.kernels.attention.tpu_tile_gradients import load_tile, tile_gradients


def bias_gradient(
    inputs: BackwardInputs,
    mask: AttentionMask,
    terms: ScoreTerms,
    blocks: BlockSizes,
    interpret: Any,
) -> Float[Array, "..."]:
    """Returns the gradient of the bias in its own shape and type, summed in float32.

    Memory holds nothing larger than the bias.
    """
    batch, heads, queries, _ = inputs.q.shape
    keys = inputs.k.shape[2]
    bias = terms.bias
    broadcast = tuple(size == 1 for size in bias.shape)
    q_blocks = cover(queries, blocks.queries)
    k_blocks = cover(keys, blocks.keys)
    sizes = (batch, heads, q_blocks, k_blocks)

    # Axes that are summed come last in the grid, so that a block of the result is finished before
    # the next one. A bias [1, N, T, 1]: grid [heads, queries, rows, keys], grid_axes [2, 0, 1, 3]
    grid_order = sorted(range(4), key=lambda axis: broadcast[axis])
    grid_axes = [grid_order.index(axis) for axis in range(4)]
    operands = _operands(inputs, mask, terms, blocks, grid_axes)
    any_visible, _ = tile_visibility(mask, queries, keys, blocks)
    plan_rows = any_visible.shape[0]

    call = pl.pallas_call(
        functools.partial(
            _kernel,
            ScoreConfig.of(mask, terms, queries, keys),
            blocks,
            grid_axes,
            broadcast,
            plan_rows,
            operands.names,
        ),
        out_shape=jax.ShapeDtypeStruct(bias.shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=tuple(sizes[axis] for axis in grid_order),
            in_specs=operands.specs,
            out_specs=operands.specs[operands.names.index("bias")],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 4, vmem_limit_bytes=VMEM_LIMIT
        ),
        name="tessera_attention_bias",
        interpret=interpret,
    )
    is_visited = any_visible.astype(jnp.int32).reshape(-1)
    gradient = call(is_visited, *operands.arrays)
    return gradient.astype(bias.dtype)


def _operands(
    inputs: BackwardInputs,
    mask: AttentionMask,
    terms: ScoreTerms,
    blocks: BlockSizes,
    grid_axes: Sequence[int],
) -> Operands:
    """Returns the operands, by row b, head n, block of queries i and block of keys j."""
    _, heads, _, width = inputs.q.shape
    group = heads // inputs.k.shape[1]

    # One tile of a head: q and g are [B, N, T, H], lse and delta [B, N, 1, T].
    q_block = (1, 1, blocks.queries, width)
    row_block = (1, 1, 1, blocks.queries)
    kv_block = (1, 1, blocks.keys, width)

    def q_index_map(b, n, i, j):
        return b, n, i, 0

    def row_index_map(b, n, i, j):
        return b, n, 0, i

    # With 4 query heads per key/value head, query heads 4:8 read key/value head 1.
    def kv_index_map(b, n, i, j):
        return b, jax.lax.div(n, group), j, 0

    operands = Operands.of(mask, terms, grid_axes)
    operands.add("q", inputs.q, q_block, q_index_map)
    operands.add("g", inputs.g, q_block, q_index_map)
    operands.add("lse", inputs.lse, row_block, row_index_map)
    operands.add("delta", inputs.delta, row_block, row_index_map)
    operands.add("k", inputs.k, kv_block, kv_index_map)
    operands.add("v", inputs.v, kv_block, kv_index_map)
    operands.add_tokens("q", blocks.queries, lambda b, n, i, j: i)
    operands.add_tokens("kv", blocks.keys, lambda b, n, i, j: j)
    operands.add_bias(blocks.queries, blocks.keys, lambda b, n, i, j: (b, n, i, j))
    return operands


def _kernel(
    config: ScoreConfig,
    blocks: BlockSizes,
    grid_axes: Sequence[int],
    broadcast: tuple[bool, ...],
    plan_rows: int,
    names: tuple[str, ...],
    visited_ref: Any,
    *rest: Any,
) -> None:
    """Adds a tile to the gradient of its block of the bias.

    Args:
      config, blocks: of the call.
      grid_axes: the axes of the grid that are rows, heads, blocks of queries and blocks of keys.
      broadcast: the axes of the bias that have one element.
      plan_rows: rows of the batch that differ in their visible tiles.
      names: of the operands.
      visited_ref: which tiles may hold a visible pair.
      rest: references to operands and result.
    """
    *inputs, out_ref = rest
    indices = [pl.program_id(axis) for axis in grid_axes]
    _, _, q_blocks, k_blocks = (pl.num_programs(axis) for axis in grid_axes)
    row, head, q_block, k_block = indices
    refs = refs_by_name(names, inputs, row, head)

    tile_index = flat_index((row, q_block, k_block), (plan_rows, q_blocks, k_blocks))

    # The first tile of a block of the result: index 0 on all axes that are summed.
    summed = zip(indices, broadcast, strict=True)
    at_start = [index == 0 for index, is_summed in summed if is_summed]

    @pl.when(functools.reduce(jnp.logical_and, at_start, True))
    def _start() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(visited_ref[tile_index] > 0)
    def _add() -> None:
        # A block in VMEM is one tile: its offset there is 0.
        key_range = TileRange(k_block * blocks.keys, 0, blocks.keys)
        keys = tile_tokens(refs, "kv", key_range, axis=0)
        queries = TileRange(q_block * blocks.queries, 0, blocks.queries)
        tile = load_tile(config, refs, queries, keys, masked=True)
        gradients = tile_gradients(config, refs, tile, queries, keys, masked=True)

        # [S, T] -> [S, 1] or [1, T] where the bias has one query or one key
        gradient = gradients.dscores_SxT
        _, _, one_query, one_key = broadcast
        if one_query:
            gradient = gradient.sum(axis=1, keepdims=True)
        if one_key:
            gradient = gradient.sum(axis=0, keepdims=True)
        out_ref[0, 0] += _transpose(gradient)


def _transpose(x: Float[Array, "rows columns"]) -> Float[Array, "columns rows"]:
    """Returns xᵀ, of a row or a column too."""
    # A transpose takes whole tiles: [S, 1] -> [S, 128] -> [128, S] -> [1, S]
    rows, columns = x.shape
    tile_rows = LANES if rows == 1 else rows
    tile_columns = LANES if columns == 1 else columns
    tile = jnp.broadcast_to(x, (tile_rows, tile_columns))
    return tile.T[:columns, :rows]

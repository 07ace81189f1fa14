"""The forward pass on TPU: a block of queries against the tiles of resident keys that it can
see.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from research.kernels.attention import tpu_forward_down as down
from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.kernels.attention.tpu_operands import Operands, bias_tile, gather
from research.kernels.attention.tpu_plan import Blocks, Tiles, cover, plan, visibility
from research.kernels.attention.tpu_tile import (
    HIDDEN,
    LANES,
    LEAST,
    LOG2E,
    Rules,
    Side,
    scores,
    side,
    spread,
)

VMEM_LIMIT = 100 * 2**20


def _chunk(keys: int, blocks: Blocks) -> int:
    """Returns how many tiles of keys are resident."""
    return min(blocks.resident // blocks.keys, cover(keys, blocks.keys))


def forward_tiles(mask: AttentionMask, queries: int, keys: int, blocks: Blocks) -> Tiles:
    """Returns the tiles of keys that each block of queries visits, in each resident chunk."""
    return plan(*visibility(mask, queries, keys, blocks), _chunk(keys, blocks))


def forward(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: AttentionMask,
    terms: ScoreTerms,
    blocks: Blocks,
    interpret: Any,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B N 1 T"]]:
    """Returns attention and the logarithm to base 2 of each query's denominator, huge where it sees
    nothing.

    Source: Dao 2023 (FlashAttention-2), arXiv:2307.08691, algorithm 1, with the tiles that need no
        mask first.
    """
    batch, heads, queries, width = q.shape
    kv_heads, keys = k.shape[1:3]
    rules = Rules.of(mask, terms, queries, keys)
    tiles = forward_tiles(mask, queries, keys, blocks)
    chunk = _chunk(keys, blocks)
    resident = chunk * blocks.keys
    grid = (batch, heads, cover(queries, blocks.queries), cover(keys, resident))
    group = heads // kv_heads

    operands = Operands.of(mask, terms, range(4))
    operands.add("q", q, (1, 1, blocks.queries, width), lambda b, n, i, c: (b, n, i, 0))
    for name, array in (("k", k), ("v", v)):
        operands.add(
            name,
            array,
            (1, 1, resident, width),
            lambda b, n, i, c: (b, jax.lax.div(n, group), c, 0),
        )
    operands.add_tokens("q", blocks.queries, lambda b, n, i, c: i)
    operands.add_tokens("kv", resident, lambda b, n, i, c: c)
    operands.add_bias(blocks.queries, resident, lambda b, n, i, c: (b, n, i, c))
    kernel, scratch = (down.kernel, down.scratch) if blocks.down else (_kernel, _scratch)
    out, log_total = pl.pallas_call(
        functools.partial(kernel, rules, blocks, chunk, tiles.rows, operands.names),
        out_shape=(
            jax.ShapeDtypeStruct(q.shape, v.dtype),
            jax.ShapeDtypeStruct((batch, heads, 1, queries), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=grid,
            in_specs=operands.specs,
            out_specs=(
                operands.spec((1, 1, blocks.queries, width), lambda b, n, i, c: (b, n, i, 0)),
                operands.spec((1, 1, 1, blocks.queries), lambda b, n, i, c: (b, n, 0, i)),
            ),
            scratch_shapes=scratch(blocks, width),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=VMEM_LIMIT,
        ),
        name="tessera_attention_forward",
        interpret=interpret,
    )(tiles.counts, tiles.order, *operands.arrays)
    return out, log_total


def _scratch(blocks: Blocks, width: int) -> list[Any]:
    return [pltpu.VMEM((blocks.queries, across), jnp.float32) for across in (LANES, LANES, width)]


def _kernel(
    rules: Rules,
    blocks: Blocks,
    chunk: int,
    rows: int,
    names: tuple[str, ...],
    counts: Any,
    order: Any,
    *rest,
):
    *inputs, out_ref, log_total_ref, top_ref, total_ref, sum_ref = rest
    batch, head, block, part = (pl.program_id(axis) for axis in range(4))
    refs = gather(names, inputs, batch, head)
    visit = ((batch if rows > 1 else 0) * pl.num_programs(2) + block) * pl.num_programs(3) + part

    @pl.when(part == 0)
    def _start() -> None:
        top_ref[...] = jnp.full_like(top_ref, LEAST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    start = block * blocks.queries
    tokens = side(refs, "q", start, 0, blocks.queries, axis=0)

    def tile(masked: bool, index: Any, _: None) -> None:
        at = order[visit * chunk + index] * blocks.keys
        at = pl.multiple_of(at, blocks.keys)
        _tile(
            rules,
            blocks,
            refs,
            tokens,
            part * (chunk * blocks.keys) + at,
            at,
            masked,
            (top_ref, total_ref, sum_ref),
        )

    unmasked, visited = counts[2 * visit], counts[2 * visit + 1]

    def two(index: Any, _: None) -> None:
        for each in range(2):
            tile(False, 2 * index + each, None)

    # In pairs, so that the matrix units take up the second tile while the vector units finish the
    # first.
    jax.lax.fori_loop(0, jax.lax.shift_right_logical(unmasked, 1), two, None)
    jax.lax.fori_loop(unmasked & -2, unmasked, functools.partial(tile, False), None)
    jax.lax.fori_loop(unmasked, visited, functools.partial(tile, True), None)

    @pl.when(part == pl.num_programs(3) - 1)
    def _finish() -> None:
        top, sums = top_ref[...], sum_ref[...]
        total = jnp.broadcast_to(total_ref[...].sum(axis=1, keepdims=True), top.shape)
        if "sinks" in rules.given:
            sink = refs["sinks"] * LOG2E
            higher = jnp.maximum(top, sink)
            shrink = jnp.exp2(top - higher)
            top, total = higher, total * shrink + jnp.exp2(sink - higher)
            sums = sums * spread(shrink, sums.shape[1])
        seen = total > 0
        out_ref[0, 0] = (sums / spread(jnp.where(seen, total, 1.0), sums.shape[1])).astype(
            out_ref.dtype
        )
        log_total = jnp.where(seen, top + jnp.log2(total), -HIDDEN)
        log_total_ref[0, 0] = log_total.T[:1]


def _tile(
    rules: Rules,
    blocks: Blocks,
    refs: Any,
    queries: Side,
    start: Any,
    at: Any,
    masked: bool,
    state: tuple,
) -> None:
    """Adds a tile of keys, `at` tokens into the resident ones, to the running maximum, denominator
    and sum.
    """
    top_ref, total_ref, sum_ref = state
    here = pl.ds(at, blocks.keys)
    k, v = refs["k"][0, 0, here, :], refs["v"][0, 0, here, :]
    products = jax.lax.dot_general(
        refs["q"][0, 0], k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    factor = 1.0
    if rules.plain:
        factor, s = rules.scale * LOG2E, products
    if masked or not rules.plain:
        keys = side(refs, "kv", start, at, blocks.keys, axis=1)
        s, _ = scores(
            rules,
            refs,
            products,
            queries,
            keys,
            lambda: bias_tile(refs["bias"], slice(None), here),
            masked,
        )
        factor = 1.0
    if masked and rules.keys % blocks.keys:
        row = start + jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
        v = jnp.where(row < rules.keys, v, jnp.zeros_like(v))
    top = top_ref[...]
    new_top = jnp.maximum(top, s.max(axis=1, keepdims=True) * factor)
    weights = jnp.exp2(s * factor - spread(new_top, blocks.keys))
    shrink = jnp.exp2(top - new_top)
    partial = sum(weights[:, i : i + LANES] for i in range(0, blocks.keys, LANES))
    total_ref[...] = total_ref[...] * shrink + partial
    top_ref[...] = new_top
    product = jnp.dot(weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    sum_ref[...] = sum_ref[...] * spread(shrink, product.shape[1]) + product

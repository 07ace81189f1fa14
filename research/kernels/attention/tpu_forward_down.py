"""The forward kernel on TPU where matrix units are 256 wide: keys down and queries across, the next
products ahead.

A head of 128 fills half of such a unit where it is what lies across; here it is what streams
through. What belongs to a query is a row of lanes, so that its maximum and denominator cost next to
nothing. The products of the next tile are made while the exponentials of this one are.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from research.kernels.attention.tpu_operands import bias_tile, gather
from research.kernels.attention.tpu_plan import Blocks
from research.kernels.attention.tpu_tile import HIDDEN, LEAST, LOG2E, Rules, Side, scores, side


def scratch(blocks: Blocks, width: int) -> list[Any]:
    """Returns what the kernel keeps: maximum, denominator, sum of values, and a tile of
    products.
    """
    row = pltpu.VMEM((1, blocks.queries), jnp.float32)
    shapes = ((width, blocks.queries), (blocks.keys, blocks.queries))
    return [row, row, *(pltpu.VMEM(shape, jnp.float32) for shape in shapes)]


def kernel(
    rules: Rules,
    blocks: Blocks,
    chunk: int,
    rows: int,
    names: tuple[str, ...],
    counts: Any,
    order: Any,
    *rest: Any,
) -> None:
    """Computes a block of queries against a chunk of resident keys.

    Args:
      rules, blocks: of the call.
      chunk: tiles of keys in a resident chunk.
      rows: batch rows that the plan tells apart.
      names: of the operands.
      counts, order: the plan.
      rest: references to operands, results and scratch.
    """
    *inputs, out_ref, log_total_ref, top_ref, total_ref, sum_ref, products_ref = rest
    batch, head, block, part = (pl.program_id(axis) for axis in range(4))
    refs = gather(names, inputs, batch, head)
    visit = ((batch if rows > 1 else 0) * pl.num_programs(2) + block) * pl.num_programs(3) + part
    unmasked, visited = counts[2 * visit], counts[2 * visit + 1]

    @pl.when(part == 0)
    def _start() -> None:
        top_ref[...] = jnp.full_like(top_ref, LEAST)
        total_ref[...] = jnp.zeros_like(total_ref)
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def place(index: Any) -> Any:
        return pl.multiple_of(order[visit * chunk + index] * blocks.keys, blocks.keys)

    def prepare(index: Any) -> None:
        k = refs["k"][0, 0, pl.ds(place(index), blocks.keys), :]
        products_ref[...] = jax.lax.dot_general(
            k, refs["q"][0, 0], (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
        )

    queries = side(refs, "q", block * blocks.queries, 0, blocks.queries, axis=1)

    def tile(masked: bool, index: Any, _: None) -> None:
        products, at = products_ref[...], place(index)
        # The last products are made twice: a branch would keep the two halves of this from being
        # mixed.
        prepare(jnp.minimum(index + 1, visited - 1))
        start = part * (chunk * blocks.keys) + at
        _absorb(
            rules, blocks, refs, queries, products, start, at, masked, (top_ref, total_ref, sum_ref)
        )

    pl.when(visited > 0)(functools.partial(prepare, 0))
    jax.lax.fori_loop(0, unmasked, functools.partial(tile, False), None)
    jax.lax.fori_loop(unmasked, visited, functools.partial(tile, True), None)

    @pl.when(part == pl.num_programs(3) - 1)
    def _finish() -> None:
        top, total, shrink = top_ref[...], total_ref[...], 1.0
        if "sinks" in rules.given:
            sink = refs["sinks"] * LOG2E
            higher = jnp.maximum(top, sink)
            shrink = jnp.exp2(top - higher)
            top, total = higher, total * shrink + jnp.exp2(sink - higher)
        seen = total > 0
        out_ref[0, 0] = (sum_ref[...] * (shrink / jnp.where(seen, total, 1.0))).T.astype(
            out_ref.dtype
        )
        log_total_ref[0, 0] = jnp.where(seen, top + jnp.log2(total), -HIDDEN)


def _absorb(
    rules: Rules,
    blocks: Blocks,
    refs: Any,
    queries: Side,
    products: Any,
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
    v = refs["v"][0, 0, here, :]
    factor, s = rules.scale * LOG2E, products
    if masked or not rules.plain:
        keys = side(refs, "kv", start, at, blocks.keys, axis=0)
        bias: Callable[[], Any] = lambda: bias_tile(refs["bias"], slice(None), here).T  # noqa: E731
        s, _ = scores(rules, refs, products, queries, keys, bias, masked)
        factor = 1.0
    if masked and rules.keys % blocks.keys:
        row = start + jax.lax.broadcasted_iota(jnp.int32, v.shape, 0)
        v = jnp.where(row < rules.keys, v, jnp.zeros_like(v))
    top = top_ref[...]
    new_top = jnp.maximum(top, s.max(axis=0, keepdims=True) * factor)
    weights = jnp.exp2(s * factor - new_top)
    shrink = jnp.exp2(top - new_top)
    total_ref[...] = total_ref[...] * shrink + weights.sum(axis=0, keepdims=True)
    top_ref[...] = new_top
    product = jax.lax.dot_general(
        v, weights.astype(v.dtype), (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    sum_ref[...] = sum_ref[...] * shrink + product

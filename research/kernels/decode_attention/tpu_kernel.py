"""The kernel of decode attention for TPU: pages come by their own copies, a block ahead of the
arithmetic.

A program of the grid holds one sequence's rows of some key/value heads, and walks the blocks of
pages that its length and window need. While it computes on a block, the next one is under way into
the other half of the buffers, be it of this sequence or of the next that has any.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES, SUBLANES = 128, 8
LOG2E = math.log2(math.e)
# Scores are kept in units of log 2. A hidden one lies so far below the least maximum that its
# exponential is 0.
HIDDEN, LEAST = -1e30, -0.5e30


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static about a call.

    Attributes:
      rows: R.
      group: G.
      height: R · G in whole tiles of fast memory.
      heads: key/value heads of one program.
      unrolled: how many of them are computed beside each other.
      page_size: C.
      block_pages: pages that are computed on together.
      window, softcap, scale: of the call.
      given: names of the arrays there are: `alibi`, `sinks`.
      quantized: whether there are scales.
    """

    rows: int
    group: int
    height: int
    heads: int
    unrolled: int
    page_size: int
    block_pages: int
    window: int | None
    softcap: float | None
    scale: float
    given: tuple[str, ...]
    quantized: bool

    @property
    def block(self) -> int:
        """Tokens of a block."""
        return self.block_pages * self.page_size


def kernel(plan: Plan, *refs: Any) -> None:
    """Computes one sequence; `refs` are those of `tpu.decode_attention`."""
    lengths, first, end, before, following, here, there, q_ref, *rest = refs
    extras = dict(zip(plan.given, rest, strict=False))
    stored = 4 if plan.quantized else 2
    rest = rest[len(plan.given) :]
    pages, out_ref, buffers = rest[:stored], rest[stored], rest[stored + 1 : 2 * stored + 1]
    semaphores, sums = rest[2 * stored + 1], rest[2 * stored + 2 :]
    part, row = pl.program_id(0), pl.program_id(1)
    length, start, stop = lengths[row], first[row], end[row]
    blocks = _blocks(plan, stop - start)
    copies = functools.partial(_copies, plan, part, pages, buffers, semaphores)

    def fetch(table: Any, place: Array, past: Array, slot: Array | int) -> None:
        def page(index: Array, _: None) -> None:
            for copy in copies(table[0, 0, place + index], index, slot):
                copy.start()

        jax.lax.fori_loop(0, jnp.minimum(past - place, plan.block_pages), page, None)

    def await_pages(place: Array, slot: Array) -> None:
        def page(index: Array, _: None) -> None:
            for copy in copies(0, index, slot):
                copy.wait()

        jax.lax.fori_loop(0, jnp.minimum(stop - place, plan.block_pages), page, None)

    top_ref, total_ref, sum_ref = sums
    top_ref[...] = jnp.full_like(top_ref, LEAST)
    total_ref[...] = jnp.zeros_like(total_ref)
    sum_ref[...] = jnp.zeros_like(sum_ref)

    @pl.when((before[row] == 0) & (blocks > 0))
    def _() -> None:
        fetch(here, start, stop, 0)

    def step(index: Array, _: None) -> None:
        slot, place = jax.lax.rem(before[row] + index, 2), start + index * plan.block_pages

        @pl.when(index + 1 < blocks)
        def _() -> None:
            fetch(here, place + plan.block_pages, stop, 1 - slot)

        @pl.when((index + 1 == blocks) & (following[row] < pl.num_programs(1)))
        def _() -> None:
            after = jnp.minimum(following[row], pl.num_programs(1) - 1)
            fetch(there, first[after], end[after], 1 - slot)

        await_pages(place, slot)
        key = place * plan.page_size
        plain = key + plan.block <= length - plan.rows + 1
        if plan.window is not None:
            plain &= key >= length - plan.window
        compute = functools.partial(
            _block, plan, extras, q_ref, buffers, slot, part, key, length, sums
        )
        pl.when(plain)(functools.partial(compute, masked=False))
        pl.when(jnp.logical_not(plain))(functools.partial(compute, masked=True))

    jax.lax.fori_loop(0, blocks, step, None)
    _finish(plan, extras, sums, out_ref)


def _blocks(plan: Plan, pages: Array) -> Array:
    return jax.lax.div(pages + plan.block_pages - 1, plan.block_pages)


def _copies(
    plan: Plan,
    part: Array,
    pages: Any,
    buffers: Any,
    semaphores: Any,
    page: Array | int,
    index: Array,
    slot: Array | int,
) -> list[Any]:
    """Returns the copies of one page into its place in a block: keys, values, and their scales."""
    found = []
    tokens = pl.ds(pl.multiple_of(index * plan.page_size, plan.page_size), plan.page_size)
    heads = pl.ds(part * plan.heads, plan.heads)
    for stored, buffer in zip(pages, buffers, strict=True):
        if len(stored.shape) == 4:
            source, target = stored.at[page, heads], buffer.at[slot, :, tokens]
        else:  # scales: heads lie under each other in tiles of memory, which are copied whole
            source, target = stored.at[page], buffer.at[slot, :, tokens]
        found.append(pltpu.make_async_copy(source, target, semaphores.at[slot]))
    return found


def _block(
    plan: Plan,
    extras: dict[str, Any],
    q_ref: Any,
    buffers: Any,
    slot: Array,
    part: Array,
    key: Array,
    length: Array,
    sums: Any,
    *,
    masked: bool,
) -> None:
    """Adds a block of keys, the first of position `key`, to the sums of every head."""
    row = jax.lax.broadcasted_iota(jnp.int32, (plan.height, 1), 0)
    position = length - plan.rows + jax.lax.rem(row, plan.rows)
    keys = key + jax.lax.broadcasted_iota(jnp.int32, (1, plan.block), 1)
    distance = position - keys
    seen = None
    if masked:
        seen = distance >= 0
        if plan.window is not None:
            seen &= distance < plan.window
        # Values that no row sees may be anything, which times a weight of zero is not zero.
        down = key + jax.lax.broadcasted_iota(jnp.int32, (plan.block, 1), 0)
        some = down < length
        if plan.window is not None:
            some &= down > length - plan.rows - plan.window

    def head(index: Any) -> None:
        k, v = (buffer[slot, index] for buffer in buffers[:2])
        if v.dtype != q_ref.dtype:
            k, v = (_widen(x, q_ref.dtype) for x in (k, v))
        if masked:
            v = jnp.where(some, v.astype(jnp.float32), 0.0).astype(v.dtype)
        scaling = [buffer[slot, pl.ds(part * plan.heads + index, 1)] for buffer in buffers[2:]]
        s = _scores(plan, extras, q_ref[0, index], k, scaling[:1], index, distance)
        s = s if seen is None else jnp.where(seen, s, HIDDEN)
        top_ref, total_ref, sum_ref = sums
        top = top_ref[index]
        new_top = jnp.maximum(top, jnp.max(s, axis=1, keepdims=True))
        weights = jnp.exp2(s - new_top[:, :1])
        shrink = jnp.exp2(top - new_top)
        top_ref[index] = new_top
        total_ref[index] = total_ref[index] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        if plan.quantized:
            weights *= scaling[1]
            weights = weights if seen is None else jnp.where(seen, weights, 0.0)
        more = jax.lax.dot_general(
            weights.astype(v.dtype), v, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        sum_ref[index] = sum_ref[index] * shrink[:, :1] + more

    def heads(chunk: Array, _: None) -> None:
        for offset in range(plan.unrolled):
            head(chunk * plan.unrolled + offset)

    jax.lax.fori_loop(0, plan.heads // plan.unrolled, heads, None)


def _widen(x: Array, dtype: Any) -> Array:
    """Returns 8-bit numbers in the type of the queries; what this chip does not do in one step it
    does in two.
    """
    return x.astype(jnp.float32).astype(dtype)


def _scores(
    plan: Plan,
    extras: dict[str, Any],
    q: Float[Array, "rows H"],
    k: Float[Array, "S H"],
    key_scale: list[Array],
    head: Any,
    distance: Int[Array, "rows S"],
) -> Float[Array, "rows S"]:
    """Returns the scores of a head in units of log 2."""
    s = jax.lax.dot_general(q, k, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    for scale in key_scale:
        s *= scale
    if plan.softcap is None:
        s *= plan.scale * LOG2E
    else:
        s = jnp.tanh(s * (plan.scale / plan.softcap)) * (plan.softcap * LOG2E)
    if "alibi" in extras:
        s -= extras["alibi"][0, head] * LOG2E * distance.astype(jnp.float32)
    return s


def _finish(plan: Plan, extras: dict[str, Any], sums: Any, out_ref: Any) -> None:
    top_ref, total_ref, sum_ref = sums
    top, total, out = top_ref[...], total_ref[...], sum_ref[...]
    seen = total > 0
    if "sinks" in extras:
        sink = extras["sinks"][0] * LOG2E
        higher = jnp.maximum(top, sink)
        shrink = jnp.exp2(top - higher)
        total = total * shrink + jnp.exp2(sink - higher)
        out *= shrink[:, :, :1]
    out_ref[0] = (out / jnp.where(seen, total, 1.0)[:, :, :1]).astype(out_ref.dtype)

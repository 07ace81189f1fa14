"""The kernels of decode attention for Hopper GPUs: one adds up a part of a sequence, one joins the parts.

A block of threads holds the rows of one key/value head and walks some steps of one sequence, each of `STEP` tokens. One
warpgroup copies their pages into a ring of shared memory, as many steps ahead as there is room; the other computes.
Two blocks or more lie on each processor, so that while one starts or ends the memory is busy with another's pages.

The tensor cores take 64 rows at a time, and a few queries would fill them with nothing. So the scores are computed
transposed, k qᵀ, and so is the result, vᵀ wᵀ: keys and head width are the 64 rows, and the queries are the columns, of
which there may be as few as eight. All that is done a score is thereby done no more often than it must be.

Source: Dao et al. 2023 (Flash-Decoding), https://pytorch.org/blog/flash-decoding, for the parts of a sequence.
"""

import dataclasses
import functools
import math
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from research.kernels.attention.gpu_tile import HIDDEN, LOG2E, along, load, product, spread, zeros

# Tokens of a step: the rows of a warpgroup's matmul.
STEP = 64
# Parts whose sums are loaded together when they are joined.
TOGETHER = 4
COMPUTE, COPY = 0, 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static about a call.

    Attributes:
      rows: R.
      tiles: pieces that the rows of a key/value head are cut into.
      height: rows of a piece, padded.
      page_size: C.
      stages: steps that shared memory holds.
      window, softcap, scale: of the call.
      given: names of the arrays there are: `alibi`, `sinks`.
      largest: the largest number of the pages' type if they are quantized, or None.
      interpret: run on the CPU by JAX's interpreter of GPU kernels.
    """

    rows: int
    tiles: int
    height: int
    page_size: int
    stages: int
    window: int | None
    softcap: float | None
    scale: float
    given: tuple[str, ...]
    largest: float | None
    interpret: bool

    @property
    def copied(self) -> int:
        """Tokens that lie together in memory, of a step."""
        return min(self.page_size, STEP)


def tiled(shape: tuple[int, ...], dtype: Any) -> Any:
    """Returns shared memory laid out for the copy engine and the matmul."""
    size = jnp.dtype(dtype).itemsize
    swizzle = math.gcd(128, shape[-1] * size)
    transforms = (plgpu.TilingTransform((8, swizzle // size)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def scratch(plan: Plan, width: int, dtype: Any, stored: Any) -> dict[str, Any]:
    """Returns what the warpgroups of a block share.

    Args:
      plan: the static plan.
      width: H.
      dtype: of the matmuls' operands.
      stored: of the pages.
    """
    pieces = STEP // plan.copied
    found = {"q": tiled((plan.height, width), dtype), "weights": tiled((plan.height, STEP), dtype)}
    found["q_full"] = plgpu.Barrier()
    for name in ("k", "v"):
        found[name] = tiled((plan.stages, STEP, width), stored)
        arrivals = pieces
        if plan.largest is not None:
            found[f"{name}_scale"] = plgpu.SMEM((plan.stages, STEP), jnp.float32)
            arrivals *= 2
        found[f"{name}_full"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.stages)
        found[f"{name}_free"] = plgpu.Barrier(num_barriers=plan.stages)
    if plan.largest is not None:
        found["wide"] = tiled((STEP, width), dtype)
    return found


def part_kernel(plan: Plan, *refs: Any, **shared: Any) -> None:
    """Adds up one part of a sequence for one piece of the rows of a key/value head."""
    work, table, q_ref, *rest = refs
    extras = dict(zip(plan.given, rest, strict=False))
    *stored, out_ref, sums_ref = rest[len(plan.given) :]
    part, head, warpgroup = (lax.axis_index(name) for name in ("part", "head", "warpgroup"))
    row, begin, steps, length = (work[part, column] for column in range(4))

    @pl.when((warpgroup == COMPUTE) & (steps > 0))
    def _() -> None:
        plgpu.copy_gmem_to_smem(q_ref.at[row, head], shared["q"], shared["q_full"])
        plgpu.barrier_wait(shared["q_full"])
        out, top, total = _sums(plan, extras, (head, begin, steps, length), shared)
        out_ref[part, head] = out
        sums_ref[part, head, 0] = top
        sums_ref[part, head, 1] = total

    @pl.when((warpgroup == COPY) & (steps > 0))
    def _() -> None:
        kv_head = lax.div(head, jnp.int32(plan.tiles))
        _feed(plan, stored, (table.at[row], kv_head, begin, steps, length), shared)


def _feed(plan: Plan, stored: list[Any], at: tuple, shared: dict[str, Any]) -> None:
    """Copies the pages of a part, each as soon as there is room."""
    table, kv_head, begin, steps, length = at
    copied, size = plan.copied, jnp.int32(plan.page_size)
    last = lax.div(length - 1, size)
    names = ("k", "v", "k_scale", "v_scale")[: len(stored)]

    def ids(step: Array) -> tuple[Array, ...]:
        place = lax.div(begin + step * STEP, size)
        # Past the last page it is read again: what the table holds there is anything.
        return tuple(table[jnp.minimum(place + piece, last)] for piece in range(STEP // copied))

    def copy(step: Array, pages: tuple[Array, ...]) -> tuple[Array, ...]:
        # A step ahead, so that no copy waits for the id of its page.
        following = ids(step + 1)
        slot = lax.rem(step, jnp.int32(plan.stages))
        source = pl.ds(lax.rem(begin + step * STEP, size) if plan.page_size > STEP else 0, copied)

        @pl.when(step >= plan.stages)
        def _() -> None:
            for name in ("k", "v"):
                plgpu.barrier_wait(shared[f"{name}_free"].at[slot])

        for name, ref in zip(names, stored, strict=True):
            for piece, page in enumerate(pages):
                target = shared[name].at[slot, pl.ds(piece * copied, copied)]
                full = shared[f"{name[0]}_full"].at[slot]
                plgpu.copy_gmem_to_smem(ref.at[page, kv_head, source], target, full)
        return following

    lax.fori_loop(0, steps, copy, ids(jnp.int32(0)))
    for slot in range(plan.stages):

        @pl.when(slot < steps)
        def _(slot: int = slot) -> None:
            for name in ("k", "v"):
                plgpu.barrier_wait(shared[f"{name}_free"].at[slot])


def _sums(plan: Plan, extras: dict[str, Any], at: tuple, shared: dict[str, Any]) -> tuple[Array, Array, Array]:
    """Returns of a part Σ 2^(s − top) v, the greatest score `top` in units of log 2, and Σ 2^(s − top), by row."""
    head, begin, steps, length = at
    height, width = shared["q"].shape
    tile = (STEP, height)
    slopes = load(plan, extras["alibi"], (head, pl.ds(0, height)), 1) if "alibi" in extras else None

    def step(index: Array, carry: tuple) -> tuple:
        out, top, total = carry
        slot = lax.rem(index, jnp.int32(plan.stages))
        key = begin + index * STEP
        plgpu.barrier_wait(shared["k_full"].at[slot])
        k = shared["k"].at[slot] if plan.largest is None else _wide(plan, shared["k"], slot, shared["q"].dtype)
        raw = product(plan, k, shared["q"], transpose_b=True)
        if plan.largest is not None:
            raw *= along(load(plan, shared["k_scale"], (slot, pl.ds(0, STEP)), 0), 0, tile)
        plgpu.barrier_arrive(shared["k_free"].at[slot])
        s, seen = _scores(plan, raw, (head, key, length), slopes)
        new_top = jnp.maximum(top, jnp.max(s, axis=0))
        weights = jnp.exp2(s - along(new_top, 1, tile))
        shrink = jnp.exp2(top - new_top)
        # Rows of different keys are added up at the end only.
        total = total * along(shrink, 1, tile) + weights
        plgpu.barrier_wait(shared["v_full"].at[slot])
        values = shared["v"].at[slot]
        if plan.largest is not None:
            # Times the largest number they are of the values' own size, and no type is too narrow for them.
            scale = load(plan, shared["v_scale"], (slot, pl.ds(0, STEP)), 0) * plan.largest
            weights = jnp.where(seen, weights * along(scale, 0, tile), 0.0)
            shared["wide"][...] = _wide(plan, shared["v"], slot, shared["q"].dtype)
            values = shared["wide"]

        @pl.when(key + STEP > length)
        def _() -> None:
            # Values that no token has may be anything, which times a weight of zero is not zero.
            down = spread(plan, lax.broadcasted_iota(jnp.int32, (STEP, width), 0))
            v = load(plan, values, (pl.ds(0, STEP), pl.ds(0, width)))
            values[...] = jnp.where(down < length - key, v.astype(jnp.float32), 0.0).astype(v.dtype)

        _store_turned(plan, weights.astype(shared["q"].dtype), shared["weights"])
        plgpu.commit_smem()
        out = out * along(shrink, 1, out.shape)
        out = product(plan, values, shared["weights"], out, transpose_a=True, transpose_b=True)
        plgpu.barrier_arrive(shared["v_free"].at[slot])
        return out, new_top, total

    least = spread(plan, jnp.full((height,), HIDDEN / 2, jnp.float32), axis=1)
    start = zeros(plan, width, height), least, zeros(plan, *tile)
    out, top, total = lax.fori_loop(0, steps, step, start)
    return out, top, jnp.sum(total, axis=0)


def _wide(plan: Plan, ref: Any, slot: Array, dtype: Any) -> Array:
    """Returns 8-bit numbers in the type of the matmul, which holds each of them."""
    if plan.interpret:
        return ref[slot].astype(dtype)
    x = plgpu.load(ref, (slot,), layout=plgpu.Layout.WGMMA_UPCAST_2X)
    if x.dtype == jnp.float8_e4m3fn and dtype == jnp.bfloat16:
        x = x.astype(jnp.float32)
    return spread(plan, x.astype(dtype))


def _store_turned(plan: Plan, x: Array, ref: Any) -> None:
    if plan.interpret:
        ref[...] = x.T
    else:
        turned = ref.transpose((1, 0))
        turned[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def _scores(
    plan: Plan, raw: Float[Array, "S rows"], at: tuple, slopes: Float[Array, "rows"] | None
) -> tuple[Float[Array, "S rows"], Array]:
    """Returns the scores of a step times log₂e, `HIDDEN` where a row does not see a key, and where it does."""
    head, key, length = at
    row = spread(plan, lax.broadcasted_iota(jnp.int32, raw.shape, 1))
    if plan.rows > 1:
        row = lax.rem(row + lax.rem(head, jnp.int32(plan.tiles)) * plan.height, jnp.int32(plan.rows))
    else:
        row = row * 0
    down = spread(plan, lax.broadcasted_iota(jnp.int32, raw.shape, 0))
    distance = row - down + (length - plan.rows - key)
    seen = distance >= 0
    if plan.window is not None:
        seen &= distance < plan.window
    if plan.softcap is None:
        s = raw * (plan.scale * LOG2E)
    else:
        s = jnp.tanh(raw * (plan.scale / plan.softcap)) * (plan.softcap * LOG2E)
    if slopes is not None:
        s -= along(slopes * LOG2E, 1, raw.shape) * distance.astype(jnp.float32)
    return jnp.where(seen, s, HIDDEN), seen


def join_kernel(plan: Plan, *refs: Any) -> None:
    """Joins the parts of one sequence for one piece of the rows of a key/value head."""
    spans, parts_ref, sums_ref, *sinks, out_ref = refs
    head, row = lax.axis_index("head"), lax.axis_index("sequence")
    first, end = spans[row, 0], spans[row, 1]
    width, height = parts_ref.shape[2:]

    def sums(part: Array, which: int) -> Array:
        return load(plan, sums_ref, (part, head, which, pl.ds(0, height)), 1)

    def step(index: Array, carry: tuple) -> tuple:
        out, top, total = carry
        begin = first + index * TOGETHER
        # Past the last part it is read again, and weighs nothing.
        parts = [jnp.minimum(begin + offset, end - 1) for offset in range(TOGETHER)]
        there = [jnp.where(begin + offset < end, 1.0, 0.0) for offset in range(TOGETHER)]
        tops = [sums(part, 0) for part in parts]
        new_top = functools.reduce(jnp.maximum, tops, top)
        shrink = jnp.exp2(top - new_top)
        out, total = out * along(shrink, 1, out.shape), total * shrink
        for part, weight, its_top in zip(parts, there, tops, strict=True):
            factor = jnp.exp2(its_top - new_top) * weight
            total += sums(part, 1) * factor
            more = load(plan, parts_ref, (part, head, pl.ds(0, width), pl.ds(0, height)))
            out += more * along(factor, 1, out.shape)
        return out, new_top, total

    least = spread(plan, jnp.full((height,), HIDDEN / 2, jnp.float32), axis=1)
    start = zeros(plan, width, height), least, zeros(plan, height, axis=1)
    steps = lax.div(end - first + (TOGETHER - 1), jnp.int32(TOGETHER))
    out, top, total = lax.fori_loop(0, steps, step, start)
    seen = total > 0
    if sinks:
        sink = load(plan, sinks[0], (head, pl.ds(0, height)), 1) * LOG2E
        higher = jnp.maximum(top, sink)
        shrink = jnp.exp2(top - higher)
        total = total * shrink + jnp.exp2(sink - higher)
        out *= along(shrink, 1, out.shape)
    factor = 1.0 / (jnp.where(seen, total, 1.0) * (plan.largest or 1.0))
    out_ref[row, head] = (out * along(factor, 1, out.shape)).astype(out_ref.dtype)

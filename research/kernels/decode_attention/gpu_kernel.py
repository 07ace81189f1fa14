"""The kernels of decode attention for Hopper GPUs: one adds up a part of a sequence, one joins the
parts.

A block, of one warpgroup, holds the rows of one key/value head and walks some steps of one
sequence, each of `STEP` tokens. Their pages are copied into a ring of shared memory, as many steps
ahead as there is room, by the copy engine: the threads only tell it to go on whenever they are done
with a buffer. Several blocks lie on each processor, so that the memory is busy with one's pages
while another starts, computes or ends.

The tensor cores take 64 rows at a time, and a few queries would fill them with nothing. So the
scores are computed transposed, k qᵀ, and so is the result, vᵀ wᵀ: keys and head width are the rows,
and the queries are the columns, of which there may be as few as eight. What is done for each score
is thereby done no more often than it must be.

Source: Dao et al. 2023 (Flash-Decoding), https://pytorch.org/blog/flash-decoding, for the parts of
    a sequence.
"""

import dataclasses
import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from research.kernels.attention.gpu_tile import (
    HIDDEN,
    LOG2E,
    along,
    load,
    product,
    spread,
    swizzled,
    zeros,
)

# Tokens of a step: the rows of a warpgroup's matmul.
STEP = 64
# Columns of the head width that a block joins.
BAND = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static about a call.

    Attributes:
      rows: R.
      tiles: pieces that the rows of a key/value head are cut into.
      height: rows of a piece, padded.
      page_size: C.
      stages: steps that shared memory holds.
      together: parts whose sums are loaded at a time when they are joined.
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
    together: int
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


def scratch(plan: Plan, width: int, dtype: Any, stored: Any) -> dict[str, Any]:
    """Returns the shared memory of a block, and its barriers.

    Args:
      plan: the static plan.
      width: H.
      dtype: of the matmuls' operands.
      stored: of the pages.
    """
    found = {
        "q": swizzled((plan.height, width), dtype),
        "weights": swizzled((plan.height, STEP), dtype),
    }
    found["q_full"] = plgpu.Barrier()
    arrivals = STEP // plan.copied * (1 if plan.largest is None else 2)
    for name in ("k", "v"):
        found[name] = swizzled((plan.stages, STEP, width), stored)
        found[f"{name}_full"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.stages)
        if plan.largest is not None:
            found[f"{name}_scale"] = plgpu.SMEM((plan.stages, STEP), jnp.float32)
    if plan.largest is not None:
        found["wide"] = swizzled((STEP, width), dtype)
    return found


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a sequence and the rows that look at it, and how its pages come into shared memory.

    Attributes:
      plan: the static plan.
      head: of the pieces of rows.
      begin, steps, length: the first token, how many steps, and the tokens of the whole sequence.
      table: its row of the table.
      stored: the pages.
      shared: of `scratch`.
    """

    plan: Plan
    head: Array
    begin: Array
    steps: Array
    length: Array
    table: Any
    stored: dict[str, Any]
    shared: dict[str, Any]

    def ids(self, step: Array | int) -> tuple[Array, ...]:
        """Returns the pages of a step, one a copy."""
        size = jnp.int32(self.plan.page_size)
        place, last = lax.div(self.begin + step * STEP, size), lax.div(self.length - 1, size)
        # Past the last page it is read again: what the table holds there is anything.
        return tuple(
            self.table[jnp.minimum(place + n, last)] for n in range(STEP // self.plan.copied)
        )

    def copy(self, which: str, step: Array | int, pages: tuple[Array, ...]) -> None:
        """Starts the copies of the keys, `k`, or the values, `v`, of a step, if the part has it."""
        copied, size = self.plan.copied, jnp.int32(self.plan.page_size)
        slot = lax.rem(jnp.int32(step), jnp.int32(self.plan.stages))
        source = pl.ds(
            lax.rem(self.begin + step * STEP, size) if self.plan.page_size > STEP else 0, copied
        )

        @pl.when(step < self.steps)
        def _() -> None:
            for name in [name for name in self.stored if name[0] == which]:
                for n, page in enumerate(pages):
                    plgpu.copy_gmem_to_smem(
                        self.stored[name].at[
                            page, lax.div(self.head, jnp.int32(self.plan.tiles)), source
                        ],
                        self.shared[name].at[slot, pl.ds(n * copied, copied)],
                        self.shared[f"{which}_full"].at[slot],
                    )


def part_kernel(plan: Plan, *refs: Any, **shared: Any) -> None:
    """Adds up one part of a sequence for one piece of the rows of a key/value head."""
    work, table, q_ref, *rest = refs
    extras = dict(zip(plan.given, rest, strict=False))
    *stored, out_ref, sums_ref = rest[len(plan.given) :]
    index, head = lax.axis_index("part"), lax.axis_index("head")
    row, begin, steps, length = (work[index, column] for column in range(4))
    stored = dict(zip(("k", "v", "k_scale", "v_scale"), stored, strict=False))
    part = _Part(plan, head, begin, steps, length, table.at[row], stored, shared)

    @pl.when(steps > 0)
    def _() -> None:
        plgpu.copy_gmem_to_smem(q_ref.at[row, head], shared["q"], shared["q_full"])
        for step, pages in enumerate([part.ids(step) for step in range(plan.stages)]):
            part.copy("k", step, pages)
            part.copy("v", step, pages)
        slopes = (
            load(plan, extras["alibi"], (head, pl.ds(0, plan.height)), 1)
            if "alibi" in extras
            else None
        )
        plgpu.barrier_wait(shared["q_full"])
        out_ref[index, head], sums_ref[index, head, 0], sums_ref[index, head, 1] = _sums(
            part, slopes
        )


def _sums(part: _Part, slopes: Float[Array, "rows"] | None) -> tuple[Array, Array, Array]:
    """Returns of a part Σ 2^(s − top) v, the greatest score `top` in units of log 2, and Σ 2^(s −
    top), by row.
    """
    plan, shared = part.plan, part.shared
    height, width = shared["q"].shape
    tile = (STEP, height)

    def step(index: Array, carry: tuple) -> tuple:
        (out, top, total), pages = carry
        ahead, slot = index + plan.stages, lax.rem(index, jnp.int32(plan.stages))
        # They are asked for a step before they are needed.
        following = part.ids(ahead + 1)
        raw = _raw_scores(part, slot)
        part.copy("k", ahead, pages)
        s, seen = _scores(part, raw, part.begin + index * STEP, slopes)
        new_top = jnp.maximum(top, jnp.max(s, axis=0))
        weights = jnp.exp2(s - along(new_top, 1, tile))
        shrink = jnp.exp2(top - new_top)
        # Keys that lie in different rows of a step are added up at the end only.
        total = total * along(shrink, 1, tile) + weights
        out = _add_values(part, out * along(shrink, 1, out.shape), weights, seen, index)
        part.copy("v", ahead, pages)
        return (out, new_top, total), following

    least = spread(plan, jnp.full((height,), HIDDEN / 2, jnp.float32), axis=1)
    start = zeros(plan, width, height), least, zeros(plan, *tile)
    (out, top, total), _ = lax.fori_loop(0, part.steps, step, (start, part.ids(plan.stages)))
    return out, top, jnp.sum(total, axis=0)


def _raw_scores(part: _Part, slot: Array) -> Float[Array, "S rows"]:
    """Returns k qᵀ of a step as soon as its keys are there."""
    plan, shared = part.plan, part.shared
    plgpu.barrier_wait(shared["k_full"].at[slot])
    if plan.largest is None:
        return product(plan, shared["k"].at[slot], shared["q"], transpose_b=True)
    raw = product(
        plan, _wide(plan, shared["k"], slot, shared["q"].dtype), shared["q"], transpose_b=True
    )
    return raw * along(load(plan, shared["k_scale"], (slot, pl.ds(0, STEP)), 0), 0, raw.shape)


def _add_values(
    part: _Part,
    out: Float[Array, "H rows"],
    weights: Float[Array, "S rows"],
    seen: Array,
    index: Array,
) -> Float[Array, "H rows"]:
    """Returns out + vᵀ weights of a step as soon as its values are there."""
    plan, shared = part.plan, part.shared
    slot, dtype = lax.rem(index, jnp.int32(plan.stages)), shared["q"].dtype
    there = part.length - part.begin - index * STEP
    plgpu.barrier_wait(shared["v_full"].at[slot])
    values = shared["v"].at[slot]
    if plan.largest is not None:
        # Times the largest number they are of the values' own size, and no type is too narrow for
        # them.
        scale = load(plan, shared["v_scale"], (slot, pl.ds(0, STEP)), 0) * plan.largest
        weights = jnp.where(seen, weights * along(scale, 0, weights.shape), 0.0)
        values = shared["wide"]
        values[...] = _wide(plan, shared["v"], slot, dtype)

    @pl.when(there < STEP)
    def _() -> None:
        # What is no token's value may be anything, which times a weight of zero is not zero.
        shape = tuple(values.shape)
        v = load(plan, values, tuple(pl.ds(0, size) for size in shape))
        tokens = _count(plan, 0, shape)
        values[...] = jnp.where(tokens < there, v.astype(jnp.float32), 0.0).astype(dtype)

    _store_turned(plan, weights.astype(dtype), shared["weights"])
    plgpu.commit_smem()
    return product(plan, values, shared["weights"], out, transpose_a=True, transpose_b=True)


def _count(plan: Plan, axis: int, shape: tuple[int, int]) -> Array:
    """Returns 0, 1, … along `axis` of a tile, whose other side need be no power of two: none of it
    is divided by.
    """
    return along(
        spread(plan, lax.broadcasted_iota(jnp.int32, shape[axis : axis + 1], 0), axis), axis, shape
    )


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
    part: _Part, raw: Float[Array, "S rows"], key: Array, slopes: Float[Array, "rows"] | None
) -> tuple[Float[Array, "S rows"], Array]:
    """Returns the scores of a step times log₂e, `HIDDEN` where a row does not see a key, and where
    it does.
    """
    plan = part.plan
    row = _count(plan, 1, raw.shape)
    if plan.tiles > 1:
        row += lax.rem(part.head, jnp.int32(plan.tiles)) * plan.height
    row = lax.rem(row, jnp.int32(plan.rows))
    down = _count(plan, 0, raw.shape)
    distance = row - down + (part.length - plan.rows - key)
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
    """Joins the parts of one sequence for one piece of the rows of a key/value head, a band of its
    width.
    """
    spans, parts_ref, sums_ref, *sinks, out_ref = refs
    head, row, band = (lax.axis_index(name) for name in ("head", "sequence", "band"))
    first, end = spans[row, 0], spans[row, 1]
    columns, rows, tile = pl.ds(band * BAND, BAND), pl.ds(0, plan.height), (BAND, plan.height)

    def step(index: Array, carry: tuple) -> tuple:
        out, top, total = carry
        places = [first + index * plan.together + offset for offset in range(plan.together)]
        # Past the last part it is read again, and weighs nothing.
        parts = [jnp.minimum(place, end - 1) for place in places]
        there = [jnp.where(place < end, 1.0, 0.0) for place in places]
        tops, totals = (
            [load(plan, sums_ref, (part, head, which, rows), 1) for part in parts]
            for which in (0, 1)
        )
        sums = [load(plan, parts_ref, (part, head, columns, rows)) for part in parts]
        new_top = functools.reduce(jnp.maximum, tops, top)
        shrink = jnp.exp2(top - new_top)
        out, total = out * along(shrink, 1, tile), total * shrink
        for weight, its_top, its_total, its_out in zip(there, tops, totals, sums, strict=True):
            factor = jnp.exp2(its_top - new_top) * weight
            total += its_total * factor
            out += its_out * along(factor, 1, tile)
        return out, new_top, total

    least = spread(plan, jnp.full((plan.height,), HIDDEN / 2, jnp.float32), axis=1)
    start = zeros(plan, *tile), least, zeros(plan, plan.height, axis=1)
    steps = lax.div(end - first + (plan.together - 1), jnp.int32(plan.together))
    out, top, total = lax.fori_loop(0, steps, step, start)
    seen = total > 0
    if sinks:
        sink = load(plan, sinks[0], (head, rows), 1) * LOG2E
        higher = jnp.maximum(top, sink)
        shrink = jnp.exp2(top - higher)
        total = total * shrink + jnp.exp2(sink - higher)
        out *= along(shrink, 1, tile)
    factor = 1.0 / (jnp.where(seen, total, 1.0) * (plan.largest or 1.0))
    out_ref[row, head, columns] = (out * along(factor, 1, tile)).astype(out_ref.dtype)

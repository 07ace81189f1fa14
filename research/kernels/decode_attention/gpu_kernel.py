"""The kernel of decode attention for Hopper GPUs that computes a split of a sequence.

`gpu_combine.py` combines the splits.

A block of one warpgroup computes the rows of one key/value head over the steps of a split, each of
`STEP` tokens. The copy engine copies their pages into a ring of `stages` slots of shared memory;
the threads only start a copy whenever they are done with a slot. Several blocks run on each
processor, so that the memory is busy with one block's pages while another starts, computes or ends.

The tensor cores take 64 rows at a time, and a few queries would fill them with padding. So the
scores are computed transposed, k qᵀ, and so is the result, vᵀ wᵀ: keys and head width are the rows,
and the queries are the columns, of which there may be as few as eight.

Shapes in names: S keys of a step, GT rows of a key/value head (G query heads times T new tokens, of
a tile), H head width.

Source: Dao et al. 2023 (Flash-Decoding), https://pytorch.org/blog/flash-decoding, for the splits of
    a sequence.
"""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static about a call.

    Attributes:
      queries: T.
      tiles: how many tiles the rows of a key/value head are cut into.
      height: rows of a tile, padded.
      page_size: tokens of a page.
      stages: steps that shared memory holds.
      together: splits whose sums are loaded at a time when they are combined.
      window, softcap, scale: of the call.
      given: names of the optional arrays: `alibi`.
      largest: the largest number of the pages' type if they are quantized, or None.
      interpret: run on the CPU by JAX's interpreter of GPU kernels.
    """

    queries: int
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
        """Tokens of a step that are contiguous in memory: one copy."""
        return min(self.page_size, STEP)


def scratch(plan: Plan, width: int, dtype: Any, stored: Any) -> dict[str, Any]:
    """Returns the shared memory of a block, and its barriers.

    Args:
      plan: the static plan.
      width: H.
      dtype: of the matmuls' operands.
      stored: of the pages.
    """
    arrays = {
        "q": swizzled((plan.height, width), dtype),
        "weights": swizzled((plan.height, STEP), dtype),
        "q_full": plgpu.Barrier(),
    }
    # A step is full when the copies of all its pages, and of their scales, have arrived.
    copies = STEP // plan.copied
    arrivals = copies if plan.largest is None else 2 * copies
    for name in ("k", "v"):
        arrays[name] = swizzled((plan.stages, STEP, width), stored)
        arrays[f"{name}_full"] = plgpu.Barrier(num_arrivals=arrivals, num_barriers=plan.stages)
        if plan.largest is not None:
            arrays[f"{name}_scale"] = plgpu.SMEM((plan.stages, STEP), jnp.float32)
    if plan.largest is not None:
        arrays["widened"] = swizzled((STEP, width), dtype)
    return arrays


@dataclasses.dataclass(frozen=True)
class _Split:
    """A split of a sequence, a tile of rows, and the copies of its pages into shared memory.

    Attributes:
      plan: the static plan.
      head: index of the tile: key/value head · tiles + tile.
      begin: the first token.
      steps: how many.
      length: tokens of the whole sequence.
      table: the sequence's row of the table.
      stored: the pages by name.
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

    def page_ids(self, step: Array | int) -> tuple[Array, ...]:
        """Returns the pages of a step, one of each copy."""
        # Pages of 16 tokens: the step of tokens 64:128 has table entries 4:8.
        page_size = jnp.int32(self.plan.page_size)
        first_token = self.begin + step * STEP
        first_entry = lax.div(first_token, page_size)
        last_token = self.length - 1
        last_entry = lax.div(last_token, page_size)

        # Entries past the last page read that page again: what the table has there is undefined.
        ids = []
        for n in range(STEP // self.plan.copied):
            entry = jnp.minimum(first_entry + n, last_entry)
            ids.append(self.table[entry])
        return tuple(ids)

    def copy(self, which: str, step: Array | int, page_ids: tuple[Array, ...]) -> None:
        """Starts the copies of the keys, `k`, or values, `v`, of a step, if the split has it."""
        copied = self.plan.copied
        page_size = jnp.int32(self.plan.page_size)
        slot = lax.rem(jnp.int32(step), jnp.int32(self.plan.stages))
        # A page longer than a step is copied from the step's first token on.
        start = 0
        if self.plan.page_size > STEP:
            start = lax.rem(self.begin + step * STEP, page_size)
        source = pl.ds(start, copied)

        @pl.when(step < self.steps)
        def _() -> None:
            for name in self.stored:
                # Copies of `k` are those of the arrays k and k_scale.
                if name[0] != which:
                    continue
                for n, page in enumerate(page_ids):
                    kv_head = lax.div(self.head, jnp.int32(self.plan.tiles))
                    target = pl.ds(n * copied, copied)
                    plgpu.copy_gmem_to_smem(
                        self.stored[name].at[page, kv_head, source],
                        self.shared[name].at[slot, target],
                        self.shared[f"{which}_full"].at[slot],
                    )


def split_kernel(plan: Plan, *refs: Any, **shared: Any) -> None:
    """Computes one split of a sequence for one tile of rows; `refs` are those of `gpu.py`."""
    # splits, table, q, alibi?, then k, v, (scales), out, sums
    splits, table, q_ref, *rest = refs
    extras = dict(zip(plan.given, rest, strict=False))
    num_extras = len(plan.given)
    *pages, out_ref, sums_ref = rest[num_extras:]
    names = ("k", "v", "k_scale", "v_scale")
    stored = dict(zip(names, pages, strict=False))

    index = lax.axis_index("split")
    head = lax.axis_index("head")
    sequence, begin, steps, length = (splits[index, column] for column in range(4))
    table_row = table.at[sequence]
    split = _Split(plan, head, begin, steps, length, table_row, stored, shared)

    @pl.when(steps > 0)
    def _() -> None:
        plgpu.copy_gmem_to_smem(q_ref.at[sequence, head], shared["q"], shared["q_full"])
        first_ids = [split.page_ids(step) for step in range(plan.stages)]
        for step, page_ids in enumerate(first_ids):
            split.copy("k", step, page_ids)
            split.copy("v", step, page_ids)

        slopes = None
        if "alibi" in extras:
            rows = pl.ds(0, plan.height)
            slopes = load(plan, extras["alibi"], (head, rows), 1)
        plgpu.barrier_wait(shared["q_full"])
        out, max_score, denominator = _sums(split, slopes)
        out_ref[index, head] = out
        sums_ref[index, head, 0] = max_score
        sums_ref[index, head, 1] = denominator


def _sums(split: _Split, slopes: Float[Array, "rows"] | None) -> tuple[Array, Array, Array]:
    """Returns Σ 2^(s - max) v of a split, max s in units of log 2, and Σ 2^(s - max), by row."""
    plan = split.plan
    shared = split.shared
    height, width = shared["q"].shape
    tile = (STEP, height)

    def step(index: Array, carry: tuple) -> tuple:
        (out_HxGT, max_GT, denominators_SxGT), ahead_ids = carry
        # The slot of this step is free for step `ahead` once this one is done with it.
        ahead = index + plan.stages
        slot = lax.rem(index, jnp.int32(plan.stages))
        # Page ids are loaded a step before they are needed.
        next_ids = split.page_ids(ahead + 1)
        raw_SxGT = _raw_scores(split, slot)
        split.copy("k", ahead, ahead_ids)

        first_key = split.begin + index * STEP
        scores_SxGT, visible_SxGT = _scores(split, raw_SxGT, first_key, slopes)
        step_max_GT = jnp.max(scores_SxGT, axis=0)
        new_max_GT = jnp.maximum(max_GT, step_max_GT)
        new_max_SxGT = along(new_max_GT, 1, tile)
        weights_SxGT = jnp.exp2(scores_SxGT - new_max_SxGT)
        rescale_GT = jnp.exp2(max_GT - new_max_GT)

        # The sum over the keys of a step is left to the end.
        rescale_SxGT = along(rescale_GT, 1, tile)
        denominators_SxGT = denominators_SxGT * rescale_SxGT + weights_SxGT
        rescale_HxGT = along(rescale_GT, 1, out_HxGT.shape)
        rescaled_HxGT = out_HxGT * rescale_HxGT
        out_HxGT = _add_values(split, rescaled_HxGT, weights_SxGT, visible_SxGT, index)
        split.copy("v", ahead, ahead_ids)
        return (out_HxGT, new_max_GT, denominators_SxGT), next_ids

    # (out [H, GT], max [GT], denominators [S, GT]) and the page ids of the first step ahead
    initial_max = jnp.full((height,), HIDDEN / 2, jnp.float32)
    initial_max_GT = spread(plan, initial_max, axis=1)
    sums = (zeros(plan, width, height), initial_max_GT, zeros(plan, *tile))
    ahead_ids = split.page_ids(plan.stages)
    sums, _ = lax.fori_loop(0, split.steps, step, (sums, ahead_ids))
    out_HxGT, max_GT, denominators_SxGT = sums
    denominator_GT = jnp.sum(denominators_SxGT, axis=0)
    return out_HxGT, max_GT, denominator_GT


def _raw_scores(split: _Split, slot: Array) -> Float[Array, "S rows"]:
    """Returns k qᵀ of a step as soon as its keys have arrived."""
    plan = split.plan
    shared = split.shared
    plgpu.barrier_wait(shared["k_full"].at[slot])
    if plan.largest is None:
        return product(plan, shared["k"].at[slot], shared["q"], transpose_b=True)

    k_SxH = _widen(plan, shared["k"], slot, shared["q"].dtype)
    raw_SxGT = product(plan, k_SxH, shared["q"], transpose_b=True)
    tokens = pl.ds(0, STEP)
    scale_S = load(plan, shared["k_scale"], (slot, tokens), 0)
    scale_SxGT = along(scale_S, 0, raw_SxGT.shape)
    return raw_SxGT * scale_SxGT


def _add_values(
    split: _Split,
    out_HxGT: Float[Array, "H rows"],
    weights_SxGT: Float[Array, "S rows"],
    visible_SxGT: Array,
    index: Array,
) -> Float[Array, "H rows"]:
    """Returns out + vᵀ weights of a step as soon as its values have arrived."""
    plan = split.plan
    shared = split.shared
    dtype = shared["q"].dtype
    slot = lax.rem(index, jnp.int32(plan.stages))
    # Tokens of the sequence from the step's first one on.
    tokens_left = split.length - split.begin - index * STEP
    plgpu.barrier_wait(shared["v_full"].at[slot])
    values_SxH = shared["v"].at[slot]

    if plan.largest is not None:
        # A scale times the largest number is of the size of the values, so that weights do not
        # underflow in float16. `gpu_combine` divides by that number.
        tokens = pl.ds(0, STEP)
        scale_S = load(plan, shared["v_scale"], (slot, tokens), 0)
        scale_S = scale_S * plan.largest
        scale_SxGT = along(scale_S, 0, weights_SxGT.shape)
        scaled_SxGT = weights_SxGT * scale_SxGT
        weights_SxGT = jnp.where(visible_SxGT, scaled_SxGT, 0.0)
        values_SxH = shared["widened"]
        values_SxH[...] = _widen(plan, shared["v"], slot, dtype)

    @pl.when(tokens_left < STEP)
    def _() -> None:
        # Slots that nobody wrote may hold NaN, and a weight of zero times NaN is NaN.
        shape = tuple(values_SxH.shape)
        whole = tuple(pl.ds(0, size) for size in shape)
        v_SxH = load(plan, values_SxH, whole)
        token_SxH = _count(plan, 0, shape)
        wide_SxH = v_SxH.astype(jnp.float32)
        kept_SxH = jnp.where(token_SxH < tokens_left, wide_SxH, 0.0)
        values_SxH[...] = kept_SxH.astype(dtype)

    weights_SxGT = weights_SxGT.astype(dtype)
    _store_transposed(plan, weights_SxGT, shared["weights"])
    plgpu.commit_smem()
    return product(
        plan, values_SxH, shared["weights"], out_HxGT, transpose_a=True, transpose_b=True
    )


def _count(plan: Plan, axis: int, shape: tuple[int, int]) -> Array:
    """Returns 0, 1, … along `axis` of a tile, whose other side need be no power of two."""
    size = shape[axis]
    count = lax.broadcasted_iota(jnp.int32, (size,), 0)
    count = spread(plan, count, axis)
    return along(count, axis, shape)


def _widen(plan: Plan, ref: Any, slot: Array, dtype: Any) -> Array:
    """Returns 8-bit numbers in the type of the matmul, which represents each of them exactly."""
    if plan.interpret:
        return ref[slot].astype(dtype)
    x = plgpu.load(ref, (slot,), layout=plgpu.Layout.WGMMA_UPCAST_2X)
    # There is no conversion from float8 to bfloat16 in one step.
    if x.dtype == jnp.float8_e4m3fn and dtype == jnp.bfloat16:
        x = x.astype(jnp.float32)
    x = x.astype(dtype)
    return spread(plan, x)


def _store_transposed(plan: Plan, x: Array, ref: Any) -> None:
    """Writes xᵀ to shared memory."""
    if plan.interpret:
        ref[...] = x.T
    else:
        transposed = ref.transpose((1, 0))
        transposed[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def _scores(
    split: _Split,
    raw_SxGT: Float[Array, "S rows"],
    first_key: Array,
    slopes: Float[Array, "rows"] | None,
) -> tuple[Float[Array, "S rows"], Array]:
    """Returns the scores of a step times log₂e, `HIDDEN` where they are masked, and the mask."""
    plan = split.plan
    shape = raw_SxGT.shape
    # The row's token: T = 3, tiles of 40 rows: rows 0 1 2 3 of tile 1 are rows 40 41 42 43, tokens
    # 1 2 0 1.
    row_SxGT = _count(plan, 1, shape)
    if plan.tiles > 1:
        tile = lax.rem(split.head, jnp.int32(plan.tiles))
        row_SxGT += tile * plan.height
    token_SxGT = lax.rem(row_SxGT, jnp.int32(plan.queries))
    key_SxGT = _count(plan, 0, shape)
    distance_SxGT = token_SxGT - key_SxGT
    # Row t is at position length - T + t.
    first_position = split.length - plan.queries
    distance_SxGT += first_position - first_key
    visible_SxGT = distance_SxGT >= 0
    if plan.window is not None:
        visible_SxGT &= distance_SxGT < plan.window

    if plan.softcap is None:
        scores_SxGT = raw_SxGT * (plan.scale * LOG2E)
    else:
        bounded_SxGT = jnp.tanh(raw_SxGT * (plan.scale / plan.softcap))
        scores_SxGT = bounded_SxGT * (plan.softcap * LOG2E)
    if slopes is not None:
        slope_SxGT = along(slopes * LOG2E, 1, shape)
        scores_SxGT -= slope_SxGT * distance_SxGT.astype(jnp.float32)
    return jnp.where(visible_SxGT, scores_SxGT, HIDDEN), visible_SxGT

"""The kernel of decode attention for Hopper GPUs that combines the splits of a sequence.

Shapes in names: GT rows of a key/value head, of a tile; H head width.
"""

import functools
from typing import Any

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from research.kernels.attention.gpu_tile import HIDDEN, LOG2E, along, load, spread, zeros
from research.kernels.decode_attention.gpu_kernel import Plan

# Rows of H that a block computes.
BAND = 64


def combine_kernel(plan: Plan, *refs: Any) -> None:
    """Combines the splits of one sequence for one tile of rows and `BAND` rows of H."""
    ranges, out_of_splits, sums_of_splits, *sinks, out_ref = refs
    head = lax.axis_index("head")
    sequence = lax.axis_index("sequence")
    band = lax.axis_index("band")
    first = ranges[sequence, 0]
    end = ranges[sequence, 1]
    # Band 1 has rows 64:128 of H.
    first_row = band * BAND
    band_rows = pl.ds(first_row, BAND)
    rows = pl.ds(0, plan.height)

    def load_max(split: Array) -> Array:
        return load(plan, sums_of_splits, (split, head, 0, rows), 1)

    def load_denominator(split: Array) -> Array:
        return load(plan, sums_of_splits, (split, head, 1, rows), 1)

    def load_out(split: Array) -> Array:
        return load(plan, out_of_splits, (split, head, band_rows, rows))

    def step(index: Array, sums: tuple) -> tuple:
        # Splits 3:8, two together: step 1 has [5, 6], and step 2 has [7, 8] and reads [7, 7].
        first_of_step = first + index * plan.together
        splits = [first_of_step + offset for offset in range(plan.together)]
        factors = [jnp.where(split < end, 1.0, 0.0) for split in splits]
        last = end - 1
        splits = [jnp.minimum(split, last) for split in splits]
        maxima_GT = [load_max(split) for split in splits]
        denominators_GT = [load_denominator(split) for split in splits]
        outs_HxGT = [load_out(split) for split in splits]
        return _add_splits(sums, factors, maxima_GT, denominators_GT, outs_HxGT)

    sums = _initial_sums(plan)
    # 5 splits, two together: 3 steps
    num_splits = end - first
    together = jnp.int32(plan.together)
    rounded_up = num_splits + (plan.together - 1)
    steps = lax.div(rounded_up, together)
    sums = lax.fori_loop(0, steps, step, sums)

    sink_GT = None
    if sinks:
        (sink_ref,) = sinks
        sink_GT = load(plan, sink_ref, (head, rows), 1)
    result_HxGT = _divided(plan, sums, sink_GT)
    out_ref[sequence, head, band_rows] = result_HxGT.astype(out_ref.dtype)


def _initial_sums(plan: Plan) -> tuple[Array, Array, Array]:
    """Returns (out, max, denominator) of no split."""
    initial_max = jnp.full((plan.height,), HIDDEN / 2, jnp.float32)
    max_GT = spread(plan, initial_max, axis=1)
    denominator_GT = zeros(plan, plan.height, axis=1)
    out_HxGT = zeros(plan, BAND, plan.height)
    return out_HxGT, max_GT, denominator_GT


def _divided(plan: Plan, sums: tuple[Array, Array, Array], sink_GT: Array | None) -> Array:
    """Returns out / denominator of all splits, with the sink in the denominator if there is one."""
    out_HxGT, max_GT, denominator_GT = sums
    tile = out_HxGT.shape
    # Rows of negative position attend to nothing, and get zeros even with a sink.
    any_visible_GT = denominator_GT > 0

    if sink_GT is not None:
        sink_GT = sink_GT * LOG2E
        new_max_GT = jnp.maximum(max_GT, sink_GT)
        rescale_GT = jnp.exp2(max_GT - new_max_GT)
        sink_weight_GT = jnp.exp2(sink_GT - new_max_GT)
        denominator_GT = denominator_GT * rescale_GT + sink_weight_GT
        rescale_HxGT = along(rescale_GT, 1, tile)
        out_HxGT *= rescale_HxGT

    # Values of quantized pages come times the largest number of their type.
    largest = plan.largest or 1.0
    divisor_GT = jnp.where(any_visible_GT, denominator_GT, 1.0)
    divisor_GT = divisor_GT * largest
    factor_GT = 1.0 / divisor_GT
    factor_HxGT = along(factor_GT, 1, tile)
    return out_HxGT * factor_HxGT


def _add_splits(
    sums: tuple[Array, Array, Array],
    factors: list[Array],
    maxima_GT: list[Array],
    denominators_GT: list[Array],
    outs_HxGT: list[Array],
) -> tuple[Array, Array, Array]:
    """Returns (out, max, denominator) with those of some splits added, each times its factor."""
    out_HxGT, max_GT, denominator_GT = sums
    tile = out_HxGT.shape
    new_max_GT = functools.reduce(jnp.maximum, maxima_GT, max_GT)
    rescale_GT = jnp.exp2(max_GT - new_max_GT)
    rescale_HxGT = along(rescale_GT, 1, tile)
    out_HxGT = out_HxGT * rescale_HxGT
    denominator_GT = denominator_GT * rescale_GT

    # A split that was read twice has the factor 0, and adds nothing.
    splits = zip(factors, maxima_GT, denominators_GT, outs_HxGT, strict=True)
    for factor, its_max_GT, its_denominator_GT, its_out_HxGT in splits:
        weight_GT = jnp.exp2(its_max_GT - new_max_GT)
        weight_GT = weight_GT * factor
        denominator_GT += its_denominator_GT * weight_GT
        weight_HxGT = along(weight_GT, 1, tile)
        out_HxGT += its_out_HxGT * weight_HxGT
    return out_HxGT, new_max_GT, denominator_GT

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
    head, sequence, band = (lax.axis_index(name) for name in ("head", "sequence", "band"))
    first = ranges[sequence, 0]
    end = ranges[sequence, 1]
    band_rows = pl.ds(band * BAND, BAND)
    rows = pl.ds(0, plan.height)
    tile = (BAND, plan.height)

    def step(index: Array, sums: tuple) -> tuple:
        splits = [first + index * plan.together + offset for offset in range(plan.together)]
        # The last step reads the last split again, with a factor of 0.
        read = [jnp.minimum(split, end - 1) for split in splits]
        factors = [jnp.where(split < end, 1.0, 0.0) for split in splits]
        maxima_GT = [load(plan, sums_of_splits, (split, head, 0, rows), 1) for split in read]
        denominators_GT = [load(plan, sums_of_splits, (split, head, 1, rows), 1) for split in read]
        outs_HxGT = [load(plan, out_of_splits, (split, head, band_rows, rows)) for split in read]
        return _add_splits(sums, factors, maxima_GT, denominators_GT, outs_HxGT)

    initial_max = spread(plan, jnp.full((plan.height,), HIDDEN / 2, jnp.float32), axis=1)
    sums = (zeros(plan, *tile), initial_max, zeros(plan, plan.height, axis=1))
    steps = lax.div(end - first + (plan.together - 1), jnp.int32(plan.together))
    out_HxGT, max_GT, denominator_GT = lax.fori_loop(0, steps, step, sums)

    # Rows of negative position attend to nothing, and get zeros even with a sink.
    any_visible = denominator_GT > 0
    if sinks:
        sink_GT = load(plan, sinks[0], (head, rows), 1) * LOG2E
        new_max_GT = jnp.maximum(max_GT, sink_GT)
        rescale_GT = jnp.exp2(max_GT - new_max_GT)
        denominator_GT = denominator_GT * rescale_GT + jnp.exp2(sink_GT - new_max_GT)
        out_HxGT *= along(rescale_GT, 1, tile)

    divisor_GT = jnp.where(any_visible, denominator_GT, 1.0) * (plan.largest or 1.0)
    result_HxGT = out_HxGT * along(1.0 / divisor_GT, 1, tile)
    out_ref[sequence, head, band_rows] = result_HxGT.astype(out_ref.dtype)


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
    out_HxGT = out_HxGT * along(rescale_GT, 1, tile)
    denominator_GT = denominator_GT * rescale_GT

    splits = zip(factors, maxima_GT, denominators_GT, outs_HxGT, strict=True)
    for factor, its_max_GT, its_denominator_GT, its_out_HxGT in splits:
        weight_GT = jnp.exp2(its_max_GT - new_max_GT) * factor
        denominator_GT += its_denominator_GT * weight_GT
        out_HxGT += its_out_HxGT * along(weight_GT, 1, tile)
    return out_HxGT, new_max_GT, denominator_GT

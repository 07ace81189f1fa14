"""The grouped matmul for Hopper GPUs: Pallas kernels whose time follows from the number of rows,
whatever the load of the experts.

Sizes are known only when it runs, so the grid has as many blocks as there may be visits of tiles of
rows, and a table says what each of them does. The kernels take whole tiles: rows and widths that
are not are padded with zeros.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.attention.gpu_plan import TILE
from research.kernels.attention.gpu_tile import launch
from research.kernels.grouped_matmul.gpu_kernel import (
    STEP,
    Plan,
    grouped_outer,
    grouped_rows,
    outer_scratch,
    rows_scratch,
)
from research.kernels.grouped_matmul.visits import visits
from research.parallel.target import not_hopper, platform

# Blocks of a GPU's grid along any axis but its first.
MAX_VISITS = 2**16 - 1
# Widths are padded to multiples of it: tiles of the result have as many columns, or twice as many.
WIDTH = 128
# The most tiles of columns that are made one after the other for the same rows, so that caches hold
# the rows.
BAND = 8


def unsupported_reason(x: Float[Array, "rows D"], kernels: Float[Array, "E D F"]) -> str | None:
    """Returns the rule that a call breaks, with the nearest value that it allows."""
    if (reason := not_hopper()) is not None:
        return reason
    if x.dtype.name not in ("bfloat16", "float16"):
        return f"{x.dtype.name}: it takes bfloat16 or float16"
    # There are at most as many visits as groups and tiles together.
    groups = kernels.shape[0]
    most = (MAX_VISITS - groups) * TILE
    if x.shape[0] > most:
        return f"{x.shape[0]} rows: it takes at most {most} on a device"
    return None


def grouped_matmul(
    x: Float[Array, "rows D"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "rows F"]:
    """Returns each row times the kernel of its group.

    On another platform than a GPU it runs in JAX's interpreter of GPU kernels, for tests.
    """
    return _rows(x, kernels, group_sizes, transposed=False)


def transposed_matmul(
    g: Float[Array, "rows F"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "rows D"]:
    """Returns each row times the transposed kernel of its group, which is never made."""
    return _rows(g, kernels, group_sizes, transposed=True)


def outer_products(
    x: Float[Array, "rows D"], g: Float[Array, "rows F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """Returns x_eᵀ g_e of each group, in float32."""
    width = x.shape[1]
    features = g.shape[1]
    groups = group_sizes.shape[0]

    # D and F are whole tiles of the result: x [300, 200] and g [300, 130] -> [320, 256] both
    x = _pad(x, STEP)
    g = _pad(g, STEP)
    padded_width = x.shape[1]
    padded_features = g.shape[1]

    # Sizes [3, 0, 6] -> spans [[0, 3], [3, 3], [3, 9]]
    sizes = group_sizes.astype(jnp.int32)
    stops = jnp.cumsum(sizes)
    spans = jnp.stack([stops - sizes, stops], axis=1)

    plan, tiles_per_band, bands = _plan(padded_features, transposed=False)
    kernel = launch(
        plan,
        functools.partial(grouped_outer, plan),
        jax.ShapeDtypeStruct((groups, padded_width, padded_features), jnp.float32),
        outer_scratch(plan, x.dtype),
        column=tiles_per_band,
        row=padded_width // TILE,
        band=bands,
        group=groups,
    )
    products = kernel(spans, x, g)
    return products[:, :width, :features]


def _rows(x: Array, kernels: Array, group_sizes: Array, transposed: bool) -> Array:
    # Kernels are [E, D, F]: F is the axis of the result, or D where they are transposed.
    features_axis = 1 if transposed else 2
    rows = x.shape[0]
    features = kernels.shape[features_axis]

    # x [300, 200] and kernels [5, 200, 130] -> [384, 256] and [5, 256, 256]
    x = _pad(x, TILE)
    kernels = _pad(kernels, WIDTH)
    padded_rows, padded_width = x.shape
    padded_features = kernels.shape[features_axis]

    table = visit_table(group_sizes, padded_rows, padded_width // STEP)
    plan, tiles_per_band, bands = _plan(padded_features, transposed)
    kernel = launch(
        plan,
        functools.partial(grouped_rows, plan),
        jax.ShapeDtypeStruct((padded_rows, padded_features), x.dtype),
        rows_scratch(plan, x.dtype),
        column=tiles_per_band,
        visit=table.shape[0],
        band=bands,
    )
    y = kernel(table, x, kernels)
    return y[:rows, :features]


def _plan(features: int, transposed: bool) -> tuple[Plan, int, int]:
    """Returns the plan, the tiles of columns of a band, and the number of bands.

    Args:
      features: columns of the result, a multiple of `WIDTH`.
      transposed: whether rows are multiplied with the transposed kernels.
    """
    is_wide = features % (2 * WIDTH) == 0
    columns = 2 * WIDTH if is_wide else WIDTH
    plan = Plan(columns=columns, transposed=transposed, interpret=platform() != "gpu")

    # 3,072 features are 12 tiles of 256 columns: 3 bands of 4
    tiles = features // columns
    tiles_per_band = math.gcd(BAND, tiles)
    return plan, tiles_per_band, tiles // tiles_per_band


def _pad(x: Array, rows: int) -> Array:
    """Returns matrices in whole `rows` and whole `WIDTH` columns, copying nothing where they
    are.
    """
    more_rows = -x.shape[-2] % rows
    more_columns = -x.shape[-1] % WIDTH
    if not more_rows and not more_columns:
        return x
    # [E, D, F] has one axis before the matrices: ((0, 0), (0, more_rows), (0, more_columns))
    others = [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, [*others, (0, more_rows), (0, more_columns)])


def visit_table(group_sizes: Int[Array, "E"], rows: int, steps: int) -> Int[Array, "visits 5"]:
    """Returns group, tile, first row, row after the last, and steps of each visit.

    Rows past the last group are visited for no steps, which leaves zeros. Unused visits have no
    rows.

    Args:
      group_sizes: rows of each group.
      rows: of all tiles.
      steps: of a visit that has rows of a group.
    """
    plan = visits(group_sizes, rows, TILE, every_group=False)
    has_rows = plan.stop > plan.start

    # Unused visits repeat the last one: neither they nor the visit before have rows of a group, and
    # both have the same tile.
    both_empty = ~has_rows[1:] & ~has_rows[:-1]
    same_tile = plan.tile[1:] == plan.tile[:-1]
    is_unused = jnp.append(False, both_empty & same_tile)

    # Visits past the last group: of sizes [3, 4] and 8 rows, row 7.
    past = jnp.sum(group_sizes)
    start = jnp.where(has_rows, plan.start, past)
    stop_without_group = jnp.where(is_unused, start, rows)
    stop = jnp.where(has_rows, plan.stop, stop_without_group)
    visit_steps = jnp.where(has_rows, steps, 0)
    columns = (plan.group, plan.tile, start, stop, visit_steps)
    return jnp.stack([column.astype(jnp.int32) for column in columns], axis=1)

"""The grouped matmul for Hopper GPUs: Pallas kernels that take as long as there are rows, however
they are shared out.

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
# Widths are padded to multiples of it: tiles of the result have so many columns, or twice as many.
WIDTH = 128
# Tiles of columns that are made one after the other for the same rows, so that caches hold what
# they share.
BAND = 8


def unsupported_reason(x: Float[Array, "M D"], kernels: Float[Array, "E D F"]) -> str | None:
    """Returns the rule that a call breaks, with the nearest value that it allows."""
    if (reason := not_hopper()) is not None:
        return reason
    if x.dtype.name not in ("bfloat16", "float16"):
        return f"{x.dtype.name}: it takes bfloat16 or float16"
    most = (MAX_VISITS - kernels.shape[0]) * TILE
    if x.shape[0] > most:
        return f"{x.shape[0]} rows: it takes at most {most} on a device"
    return None


def grouped_matmul(
    x: Float[Array, "M D"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M F"]:
    """Returns each row times the kernel of its group.

    On another platform than a GPU it runs in JAX's interpreter of GPU kernels, for tests.
    """
    return _rows(x, kernels, group_sizes, transposed=False)


def transposed_matmul(
    g: Float[Array, "M F"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M D"]:
    """Returns each row times the transposed kernel of its group, which is never made."""
    return _rows(g, kernels, group_sizes, transposed=True)


def outer_products(
    x: Float[Array, "M D"], g: Float[Array, "M F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """Returns x_eᵀ g_e of each group, in float32."""
    (width, features), groups = (x.shape[1], g.shape[1]), group_sizes.shape[0]
    x, g = _pad(x, STEP), _pad(g, STEP)
    stops = jnp.cumsum(group_sizes.astype(jnp.int32))
    spans = jnp.stack([stops - group_sizes.astype(jnp.int32), stops], axis=1)
    plan, together, bands = _plan(g.shape[1], transposed=False)
    kernel = launch(
        plan,
        functools.partial(grouped_outer, plan),
        jax.ShapeDtypeStruct((groups, x.shape[1], g.shape[1]), jnp.float32),
        outer_scratch(plan, x.dtype),
        column=together,
        row=x.shape[1] // TILE,
        band=bands,
        group=groups,
    )
    return kernel(spans, x, g)[:, :width, :features]


def _rows(x: Array, kernels: Array, group_sizes: Array, transposed: bool) -> Array:
    axis = 1 if transposed else 2
    rows, features = x.shape[0], kernels.shape[axis]
    x, kernels = _pad(x, TILE), _pad(kernels, WIDTH)
    table = visit_table(group_sizes, x.shape[0], x.shape[1] // STEP)
    plan, together, bands = _plan(kernels.shape[axis], transposed)
    kernel = launch(
        plan,
        functools.partial(grouped_rows, plan),
        jax.ShapeDtypeStruct((x.shape[0], kernels.shape[axis]), x.dtype),
        rows_scratch(plan, x.dtype),
        column=together,
        visit=table.shape[0],
        band=bands,
    )
    return kernel(table, x, kernels)[:rows, :features]


def _plan(features: int, transposed: bool) -> tuple[Plan, int, int]:
    """Returns the plan for a result of so many columns, how many of its tiles make a band, and how
    many bands.
    """
    columns = 2 * WIDTH if features % (2 * WIDTH) == 0 else WIDTH
    together = math.gcd(BAND, features // columns)
    plan = Plan(columns=columns, transposed=transposed, interpret=platform() != "gpu")
    return plan, together, features // columns // together


def _pad(x: Array, rows: int) -> Array:
    """Returns matrices in whole `rows` and whole `WIDTH` columns, copying nothing where they
    are.
    """
    amounts = [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % rows), (0, -x.shape[-1] % WIDTH)]
    return jnp.pad(x, amounts) if any(after for _, after in amounts) else x


def visit_table(group_sizes: Int[Array, "E"], rows: int, steps: int) -> Int[Array, "visits 5"]:
    """Returns of each visit its group, its tile, the first of its rows, the one after the last, and
    its steps.

    Rows past the last group are visited for no steps, which leaves zeros. What is left of the
    visits has no rows.

    Args:
      group_sizes: rows of each group.
      rows: of all tiles.
      steps: of a visit that has rows of a group.
    """
    plan = visits(group_sizes, rows, TILE, every_group=False)
    counted = plan.stop > plan.start
    # What is left repeats the last visit.
    left = jnp.append(False, ~counted[1:] & ~counted[:-1] & (plan.tile[1:] == plan.tile[:-1]))
    start = jnp.where(counted, plan.start, jnp.sum(group_sizes))
    stop = jnp.where(counted, plan.stop, jnp.where(left, start, rows))
    table = (plan.group, plan.tile, start, stop, jnp.where(counted, steps, 0))
    return jnp.stack([column.astype(jnp.int32) for column in table], axis=1)

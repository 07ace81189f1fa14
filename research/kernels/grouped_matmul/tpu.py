"""The grouped matmul for TPU: a Pallas kernel whose grid goes over the visits of tiles of rows."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from research.kernels.grouped_matmul.visits import visits
from research.parallel.target import platform


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Tile sizes.

    Attributes:
      rows: of x, tokens.
      inner: of the axis that is contracted, or of D in the outer products.
      outer: of F.
    """

    rows: int = 512
    inner: int = 512
    outer: int = 1024


def unsupported_reason(x: Float[Array, "M D"], kernels: Float[Array, "E D F"]) -> str | None:
    """Returns the rule that a call breaks, with the nearest value that it allows."""
    if platform() != "tpu":
        return f"{platform()}: it needs a TPU"
    if x.dtype.name not in ("float32", "bfloat16"):
        return f"{x.dtype.name}: it takes bfloat16 or float32"
    return None


def _fit(blocks: Blocks, rows: int, inner: int, outer: int) -> Blocks:
    """Returns the blocks no larger than the arrays."""
    return Blocks(min(blocks.rows, rows), min(blocks.inner, inner), min(blocks.outer, outer))


def _mine(start: Any, stop: Any, tile: Any, rows: int) -> Array:
    row = tile * rows + jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
    return (row >= start) & (row < stop)


def _clean(x: Array, axis: int, part: Any, size: int) -> Array:
    """Returns a block with zeros past the end of an axis, where memory holds anything."""
    block = x.shape[axis]
    if size % block == 0:
        return x
    at = part * block + jax.lax.broadcasted_iota(jnp.int32, x.shape, axis)
    return jnp.where(at < size, x, jnp.zeros((), x.dtype))


def grouped_matmul(
    x: Float[Array, "M D"],
    kernels: Float[Array, "E D F"],
    group_sizes: Int[Array, "E"],
    blocks: Blocks = Blocks(),
    interpret: Any = False,
) -> Float[Array, "M F"]:
    """Returns each row times the kernel of its group.

    Args:
      x, kernels, group_sizes: as in the API.
      blocks: tile sizes.
      interpret: what `pallas_call` takes by that name; False compiles.
    """
    (rows, width), features = x.shape, kernels.shape[2]
    b = _fit(blocks, rows, width, features)
    plan = visits(group_sizes, rows, b.rows, every_group=False)

    def kernel(
        group: Any, tile: Any, start: Any, stop: Any, x_ref: Any, w_ref: Any, y_ref: Any, total: Any
    ) -> None:
        visit, part = pl.program_id(1), pl.program_id(2)

        @pl.when(part == 0)
        def _start() -> None:
            total[...] = jnp.zeros_like(total)

        x_part, w_part = _clean(x_ref[...], 1, part, width), _clean(w_ref[0], 0, part, width)
        total[...] += jnp.dot(x_part, w_part, preferred_element_type=jnp.float32)

        @pl.when(part == pl.num_programs(2) - 1)
        def _finish() -> None:
            mine = _mine(start[visit], stop[visit], tile[visit], b.rows)
            first = (visit == 0) | (tile[visit] != tile[jnp.maximum(visit - 1, 0)])
            before = jnp.where(first, jnp.zeros_like(total), y_ref[...].astype(jnp.float32))
            y_ref[...] = jnp.where(mine, total[...], before).astype(y_ref.dtype)

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((rows, features), x.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(features, b.outer), plan.group.shape[0], pl.cdiv(width, b.inner)),
            in_specs=[
                pl.BlockSpec((b.rows, b.inner), lambda f, v, d, group, tile, *_: (tile[v], d)),
                pl.BlockSpec((1, b.inner, b.outer), lambda f, v, d, group, *_: (group[v], d, f)),
            ],
            out_specs=pl.BlockSpec(
                (b.rows, b.outer), lambda f, v, d, group, tile, *_: (tile[v], f)
            ),
            scratch_shapes=[pltpu.VMEM((b.rows, b.outer), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary")
        ),
        name="tessera_grouped_matmul",
        interpret=interpret,
    )(plan.group, plan.tile, plan.start, plan.stop, x, kernels)


def transposed_matmul(
    g: Float[Array, "M F"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M D"]:
    """Returns each row times the transposed kernel of its group."""
    return grouped_matmul(g, kernels.swapaxes(1, 2), group_sizes)


def outer_products(
    x: Float[Array, "M D"],
    g: Float[Array, "M F"],
    group_sizes: Int[Array, "E"],
    blocks: Blocks = Blocks(),
    interpret: Any = False,
) -> Float[Array, "E D F"]:
    """Returns x_eᵀ g_e of each group, in float32; arguments as of `grouped_matmul`."""
    (rows, width), features = x.shape, g.shape[1]
    b = _fit(blocks, rows, width, features)
    plan = visits(group_sizes, rows, b.rows, every_group=True)

    def kernel(
        group: Any, tile: Any, start: Any, stop: Any, x_ref: Any, g_ref: Any, out_ref: Any
    ) -> None:
        visit = pl.program_id(2)
        mine = _mine(start[visit], stop[visit], tile[visit], b.rows)
        x_part, g_part = (
            jnp.where(mine, ref[...], jnp.zeros((), ref.dtype)) for ref in (x_ref, g_ref)
        )
        product = jax.lax.dot_general(
            x_part, g_part, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        first = (visit == 0) | (group[visit] != group[jnp.maximum(visit - 1, 0)])

        @pl.when(first)
        def _start() -> None:
            out_ref[0] = product

        @pl.when(jnp.logical_not(first))
        def _add() -> None:
            out_ref[0] += product

    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((group_sizes.shape[0], width, features), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(pl.cdiv(width, b.inner), pl.cdiv(features, b.outer), plan.group.shape[0]),
            in_specs=[
                pl.BlockSpec((b.rows, b.inner), lambda d, f, v, group, tile, *_: (tile[v], d)),
                pl.BlockSpec((b.rows, b.outer), lambda d, f, v, group, tile, *_: (tile[v], f)),
            ],
            out_specs=pl.BlockSpec(
                (1, b.inner, b.outer), lambda d, f, v, group, *_: (group[v], d, f)
            ),
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        name="tessera_grouped_outer_products",
        interpret=interpret,
    )(plan.group, plan.tile, plan.start, plan.stop, x, g)

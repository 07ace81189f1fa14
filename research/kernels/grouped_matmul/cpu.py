"""The grouped matmul for CPU: a loop over tiles of rows and the groups in them."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.grouped_matmul.visits import Visits, visits
from research.kernels.row_major import swap_last

TILE = 256


def refusal(x: Float[Array, "M D"], kernels: Float[Array, "E D F"]) -> None:
    """Takes everything."""


def _tiles(x: Float[Array, "M D"], plan: Visits, visit: Array) -> Float[Array, "tile D"]:
    """Returns the rows of a visit, those of other groups zero."""
    tile = min(TILE, x.shape[0])
    rows = plan.tile[visit] * tile + jnp.arange(tile)
    mine = (rows >= plan.start[visit]) & (rows < plan.stop[visit])
    part = jax.lax.dynamic_slice_in_dim(x, plan.tile[visit] * tile, tile)
    return jnp.where(mine[:, None], part, jnp.zeros((), x.dtype))


def _padded(x: Float[Array, "M D"]) -> Float[Array, "padded D"]:
    return jnp.pad(x, ((0, -x.shape[0] % min(TILE, x.shape[0])), (0, 0)))


def grouped_matmul(
    x: Float[Array, "M D"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M F"]:
    """Returns each row times the kernel of its group."""
    rows, tile = x.shape[0], min(TILE, x.shape[0])
    plan, x = visits(group_sizes, rows, tile, every_group=False), _padded(x)

    def add(visit: Array, y: Array) -> Array:
        kernel = jax.lax.dynamic_index_in_dim(kernels, plan.group[visit], keepdims=False)
        product = jnp.dot(_tiles(x, plan, visit), kernel, preferred_element_type=jnp.float32)
        start = plan.tile[visit] * tile
        share = jax.lax.dynamic_slice_in_dim(y, start, tile) + product
        return jax.lax.dynamic_update_slice_in_dim(y, share, start, axis=0)

    y = jnp.zeros((x.shape[0], kernels.shape[2]), jnp.float32)
    return jax.lax.fori_loop(0, plan.group.shape[0], add, y)[:rows].astype(x.dtype)


def transposed_matmul(
    g: Float[Array, "M F"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M D"]:
    """Returns each row times the transposed kernel of its group."""
    return grouped_matmul(g, kernels.swapaxes(1, 2), group_sizes)


def outer_products(
    x: Float[Array, "M D"], g: Float[Array, "M F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """Returns x_eᵀ g_e of each group, in float32."""
    plan = visits(group_sizes, x.shape[0], min(TILE, x.shape[0]), every_group=True)
    x, g = _padded(x), _padded(g)

    def add(visit: Array, total: Array) -> Array:
        product = jnp.dot(swap_last(_tiles(x, plan, visit)), _tiles(g, plan, visit), preferred_element_type=jnp.float32)
        share = jax.lax.dynamic_index_in_dim(total, plan.group[visit], keepdims=False) + product
        return jax.lax.dynamic_update_index_in_dim(total, share, plan.group[visit], axis=0)

    zeros = jnp.zeros((group_sizes.shape[0], x.shape[1], g.shape[1]), jnp.float32)
    return jax.lax.fori_loop(0, plan.group.shape[0], add, zeros)

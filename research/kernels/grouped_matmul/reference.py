"""The grouped matmul as its equation: every row with every expert, of which one counts."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def unsupported_reason(x: Float[Array, "rows D"], kernels: Float[Array, "E D F"]) -> None:
    """Returns None: every call is supported."""


def members(group_sizes: Int[Array, "E"], rows: int) -> Bool[Array, "E rows"]:
    """Returns which rows belong to each group."""
    # Sizes [2, 1] -> starts [[0], [2]], stops [[2], [3]]
    stops = jnp.cumsum(group_sizes)[:, None]
    starts = stops - group_sizes[:, None]

    # Of 4 rows -> [[1, 1, 0, 0], [0, 0, 1, 0]]
    index = jnp.arange(rows)[None]
    return (index >= starts) & (index < stops)


def rows_of_any_group(
    x: Float[Array, "rows D"], group_sizes: Int[Array, "E"]
) -> Float[Array, "rows D"]:
    """Returns the rows of all groups; those past the last one are zero."""
    is_member = members(group_sizes, x.shape[0])
    in_any_group = is_member.any(axis=0)
    zero = jnp.zeros((), x.dtype)
    return jnp.where(in_any_group[:, None], x, zero)


def _rows_by_group(
    x: Float[Array, "rows D"], group_sizes: Int[Array, "E"]
) -> Float[Array, "E rows D"]:
    # [rows, D] -> [E, rows, D], zero where a row is in another group
    is_member = members(group_sizes, x.shape[0])
    zero = jnp.zeros((), x.dtype)
    return jnp.where(is_member[:, :, None], x, zero)


def grouped_matmul(
    x: Float[Array, "rows D"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "rows F"]:
    """Returns each row times the kernel of its group, holding `[E, rows, D]`."""
    # In the equations r is a row.
    y = jnp.einsum(
        "ErD,EDF->rF", _rows_by_group(x, group_sizes), kernels, preferred_element_type=jnp.float32
    )
    return y.astype(x.dtype)


def transposed_matmul(
    g: Float[Array, "rows F"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "rows D"]:
    """Returns each row times the transposed kernel of its group."""
    transposed = kernels.swapaxes(1, 2)
    return grouped_matmul(g, transposed, group_sizes)


def outer_products(
    x: Float[Array, "rows D"], g: Float[Array, "rows F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """Returns x_eᵀ g_e of each group, in float32."""
    # A row past the last group may hold NaN, which 0 · NaN would let through.
    g = rows_of_any_group(g, group_sizes)
    return jnp.einsum(
        "ErD,rF->EDF", _rows_by_group(x, group_sizes), g, preferred_element_type=jnp.float32
    )

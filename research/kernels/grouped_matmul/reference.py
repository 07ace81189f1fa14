"""The grouped matmul as its equation: every row with every expert, of which one counts."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def unsupported_reason(x: Float[Array, "M D"], kernels: Float[Array, "E D F"]) -> None:
    """Takes everything."""


def members(group_sizes: Int[Array, "E"], rows: int) -> Bool[Array, "E M"]:
    """Returns which rows belong to each group."""
    ends = jnp.cumsum(group_sizes)[:, None]
    row = jnp.arange(rows)[None]
    return (row >= ends - group_sizes[:, None]) & (row < ends)


def _rows(x: Float[Array, "M D"], group_sizes: Int[Array, "E"]) -> Float[Array, "E M D"]:
    return jnp.where(members(group_sizes, x.shape[0])[:, :, None], x, jnp.zeros((), x.dtype))


def grouped_matmul(
    x: Float[Array, "M D"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M F"]:
    """Returns each row times the kernel of its group, holding `[E, M, D]`."""
    y = jnp.einsum(
        "EMD,EDF->MF", _rows(x, group_sizes), kernels, preferred_element_type=jnp.float32
    )
    return y.astype(x.dtype)


def transposed_matmul(
    g: Float[Array, "M F"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M D"]:
    """Returns each row times the transposed kernel of its group."""
    return grouped_matmul(g, kernels.swapaxes(1, 2), group_sizes)


def outer_products(
    x: Float[Array, "M D"], g: Float[Array, "M F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """Returns x_eᵀ g_e of each group, in float32."""
    g = jnp.where(members(group_sizes, x.shape[0]).any(axis=0)[:, None], g, jnp.zeros((), g.dtype))
    return jnp.einsum("EMD,MF->EDF", _rows(x, group_sizes), g, preferred_element_type=jnp.float32)

"""The grouped matmul for GPUs that are not Hopper, and in float32: XLA's ragged products.

XLA makes dense products of all rows with every kernel of them: E times the work, and memory for it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.grouped_matmul.reference import members
from research.parallel.target import platform

_SHARED_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def unsupported_reason(x: Float[Array, "M D"], kernels: Float[Array, "E D F"]) -> str | None:
    """Returns the rule that a call breaks."""
    return None if platform() == "gpu" else f"{platform()}: it needs a GPU"


def _rows(x: Float[Array, "M D"], group_sizes: Int[Array, "E"]) -> Float[Array, "M D"]:
    """Returns the rows of all groups; those past the last one are zero."""
    return jnp.where(
        members(group_sizes, x.shape[0]).any(axis=0)[:, None], x, jnp.zeros((), x.dtype)
    )


def grouped_matmul(
    x: Float[Array, "M D"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M F"]:
    """Returns each row times the kernel of its group."""
    y = jax.lax.ragged_dot(x, kernels, group_sizes, preferred_element_type=jnp.float32)
    return _rows(y, group_sizes).astype(x.dtype)


def transposed_matmul(
    g: Float[Array, "M F"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "M D"]:
    """Returns each row times the transposed kernel of its group."""
    return grouped_matmul(g, kernels.swapaxes(1, 2), group_sizes)


def outer_products(
    x: Float[Array, "M D"], g: Float[Array, "M F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "E D F"]:
    """Returns x_eᵀ g_e of each group, in float32."""
    x, g = _rows(x, group_sizes), _rows(g, group_sizes)
    return jax.lax.ragged_dot_general(
        x, g, group_sizes, _SHARED_ROWS, preferred_element_type=jnp.float32
    )

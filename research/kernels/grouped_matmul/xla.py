"""The grouped matmul for GPUs that are not Hopper, and in float32: XLA's ragged products.

XLA makes dense products of all rows with every kernel of them: E times the work, and memory for it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.grouped_matmul.reference import rows_of_any_group
from research.parallel.target import platform

# Both operands of an outer product have the rows, which the groups divide: they are contracted.
_CONTRACTED_ROWS = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())),
    lhs_ragged_dimensions=[0],
    rhs_group_dimensions=[],
)


def unsupported_reason(x: Float[Array, "rows D"], kernels: Float[Array, "E D F"]) -> str | None:
    """Returns the rule that a call breaks."""
    return None if platform() == "gpu" else f"{platform()}: it needs a GPU"


def grouped_matmul(
    x: Float[Array, "rows D"], kernels: Float[Array, "E D F"], group_sizes: Int[Array, "E"]
) -> Float[Array, "rows F"]:
    """Returns each row times the kernel of its group."""
    y = jax.lax.ragged_dot(x, kernels, group_sizes, preferred_element_type=jnp.float32)
    # XLA leaves rows past the last group undefined.
    y = rows_of_any_group(y, group_sizes)
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
    x = rows_of_any_group(x, group_sizes)
    g = rows_of_any_group(g, group_sizes)
    return jax.lax.ragged_dot_general(
        x, g, group_sizes, _CONTRACTED_ROWS, preferred_element_type=jnp.float32
    )

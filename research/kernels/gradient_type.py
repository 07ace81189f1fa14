"""A weight whose gradient is made, and so summed over devices, in a type of its own."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.core.trees import node, path_name
from research.kernels.grouped_matmul import grouped_matmul
from research.kernels.projection import project
from research.kernels.weights import Axes, Weight, WeightNode, einsum


@node(static=("gradient_dtype",))
@dataclasses.dataclass(frozen=True)
class GradientType(WeightNode):
    """A plain weight. What it computes is that of the plain weight.

    A product's gradient is summed over a device's own tokens in float32, rounded to this type, and
    summed over devices in it. The gradient has the type of the weight again.

    Attributes:
      array: the plain weight.
      gradient_dtype: the type, which is also that of the activations.
    """

    array: Float[Array, "..."]
    gradient_dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the plain weight."""
        return self.array.shape

    @property
    def dtype(self) -> Any:
        """The type of the plain weight."""
        return self.array.dtype

    def as_array(self) -> Float[Array, "..."]:
        """Returns the plain weight."""
        return self.array

    def project(
        self, x: Float[Array, "..."], axes: int, implementation: str
    ) -> Float[Array, "..."]:
        """Returns x W."""
        return project(
            x,
            self.array,
            axes=axes,
            implementation=implementation,
            gradient_dtype=self.gradient_dtype,
        )

    def grouped_matmul(
        self, x: Float[Array, "rows D"], group_sizes: Int[Array, "E"], implementation: str
    ) -> Float[Array, "rows F"]:
        """Returns x_e W_e of each group."""
        # Devices meet at the border of the `shard_map` around it: see `as_shard_map_argument`.
        return grouped_matmul(x, self.array, group_sizes, implementation=implementation)

    def einsum(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the contraction; its gradient is made in the type of `x`."""
        return einsum(equation, x, self.array)

    def take_rows(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Returns rows of a table."""
        # Those of a batch are taken by `parallel.row_gradients`, which sums over devices.
        return self.array[ids]

    def transpose(self) -> "GradientType":
        """Returns the transposed matrix."""
        return GradientType(self.array.T, self.gradient_dtype)

    def append_row(self, row: Float[Array, "F"]) -> "GradientType":
        """Returns the matrix with one more row."""
        longer = jnp.concatenate([self.array, row[None]], axis=0)
        return GradientType(longer, self.gradient_dtype)

    def as_product(
        self, x: Float[Array, "*batch D"]
    ) -> tuple[Float[Array, "*batch E"], Float[Array, "E F"]]:
        """Returns x and the plain weight."""
        return x, self.array

    def split_axes(self, axes: Axes, inner: Any) -> "GradientType":
        """Returns the node of the axes of the plain weight."""
        structure = jax.tree.structure(self)
        return jax.tree.unflatten(structure, (axes,))

    def plain_array(self) -> Float[Array, "..."]:
        """Returns the plain weight."""
        return self.array

    def as_shard_map_argument(self) -> Float[Array, "..."]:
        """Returns the weight in the type of its gradient: a `shard_map` sums the gradient of an
        argument in the argument's type.
        """
        return self.array.astype(self.gradient_dtype)


def with_gradient_type(params: Any, names: Collection[str], gradient_dtype: str) -> Any:
    """Returns parameters of which those with some names are a `GradientType`.

    Args:
      params: plain arrays.
      names: paths of kernels and tables.
      gradient_dtype: of their gradients' sums over devices.
    """

    def wrapped(path: tuple[Any, ...], leaf: Array) -> Weight:
        return GradientType(leaf, gradient_dtype) if path_name(path) in names else leaf

    return jax.tree_util.tree_map_with_path(wrapped, params)

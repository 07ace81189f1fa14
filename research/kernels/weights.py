"""Weights that a model multiplies with: plain arrays, or nodes of several arrays.

A model multiplies with a weight through `project`, `grouped_matmul`, `cross_entropy` or a function
of this module. Each takes a plain array or a `WeightNode`, so a model does not know which of them
its weights are.
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from research.parallel.gradient_sums import in_float32
from research.parallel.rules import constrain

# How an array's axes are described: logical names, or a partition.
Axes = tuple[Any, ...] | PartitionSpec


class WeightNode(abc.ABC):
    """A weight that is made of several arrays: a node of JAX trees whose leaves are these arrays.

    Its shape is that of the plain weight it represents. Leading axes (layers, experts) may be
    indexed in all its leaves at once, as `jax.lax.scan` does.

    Attributes:
      gradient_dtype: the type in which its gradients are summed over devices.
    """

    gradient_dtype = "float32"

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """The shape of the plain weight."""

    @property
    @abc.abstractmethod
    def dtype(self) -> Any:
        """The type of the plain weight."""

    @abc.abstractmethod
    def as_array(self) -> Float[Array, "..."]:
        """Returns the plain weight."""

    @abc.abstractmethod
    def project(
        self, x: Float[Array, "..."], axes: int, implementation: str
    ) -> Float[Array, "..."]:
        """Returns x W over the last `axes` axes of `x`; see `kernels.projection.project`."""

    @abc.abstractmethod
    def grouped_matmul(
        self, x: Float[Array, "rows D"], group_sizes: Int[Array, "E"], implementation: str
    ) -> Float[Array, "rows F"]:
        """Returns x_e W_e of each group; see `kernels.grouped_matmul.grouped_matmul`."""

    @abc.abstractmethod
    def einsum(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns `jnp.einsum(equation, x, W)` in the type of `x`."""

    @abc.abstractmethod
    def take_rows(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Returns rows of a table."""

    @abc.abstractmethod
    def transpose(self) -> "WeightNode":
        """Returns the transposed matrix."""

    @abc.abstractmethod
    def append_row(self, row: Float[Array, "F"]) -> "WeightNode":
        """Returns the matrix with one more row."""

    @abc.abstractmethod
    def as_product(
        self, x: Float[Array, "*batch D"]
    ) -> tuple[Float[Array, "*batch E"], Float[Array, "E F"]]:
        """Returns plain arrays whose product is x W, without a plain W."""

    def plain_array(self) -> Array | None:
        """Returns the only array of a node that has but one, the plain weight."""
        return None

    def as_shard_map_argument(self) -> "Weight":
        """Returns what to hand to a `shard_map`, which sums the gradient over devices."""
        return self

    @abc.abstractmethod
    def split_axes(self, axes: Axes, inner: Any) -> "WeightNode":
        """Returns the node with a description of each leaf's axes in its place.

        Args:
          axes: of the plain weight.
          inner: describes an axis that the plain weight does not have.
        """


Weight = Float[Array, "..."] | WeightNode


def is_weight(leaf: Any) -> bool:
    """Whether a node of a tree is a weight of several arrays."""
    return isinstance(leaf, WeightNode)


def as_array(weight: Weight) -> Float[Array, "..."]:
    """Returns a plain array."""
    if isinstance(weight, WeightNode):
        return weight.as_array()
    return weight


def plain_array(weight: Weight) -> Array | None:
    """Returns the plain weight where it is an array already; None where it had to be computed."""
    if isinstance(weight, WeightNode):
        return weight.plain_array()
    return weight


def einsum(equation: str, x: Float[Array, "..."], weight: Weight) -> Float[Array, "..."]:
    """Returns `jnp.einsum(equation, x, W)`, with W rounded to the type of `x`."""
    if isinstance(weight, WeightNode):
        return weight.einsum(equation, x)
    weight = weight.astype(x.dtype)
    return jnp.einsum(equation, x, weight)


def take_rows(table: Weight, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """Returns the rows of a table `[V, D]` that ids in [0, V) name."""
    if isinstance(table, WeightNode):
        return table.take_rows(ids)
    return table[ids]


def transpose(weight: Weight) -> Weight:
    """Returns a matrix transposed; a plain one is not copied."""
    if isinstance(weight, WeightNode):
        return weight.transpose()
    return weight.T


def append_row(weight: Weight, row: Float[Array, "F"]) -> Weight:
    """Returns a matrix `[D, F]` with one more row."""
    if isinstance(weight, WeightNode):
        return weight.append_row(row)
    # [D, F] and [F] -> [D + 1, F]
    return jnp.concatenate([weight, row[None]], axis=0)


def as_product(
    x: Float[Array, "*batch D"], weight: Weight
) -> tuple[Float[Array, "*batch E"], Float[Array, "E F"]]:
    """Returns plain arrays whose product is x W."""
    if isinstance(weight, WeightNode):
        return weight.as_product(x)
    return x, weight


def gradient_dtype(weight: Weight) -> str:
    """Returns the type in which a weight's gradient is summed over devices."""
    if isinstance(weight, WeightNode):
        return weight.gradient_dtype
    return "float32"


def as_shard_map_argument(weight: Weight) -> Weight:
    """Returns what to hand to a `shard_map`, which sums the gradient of an argument over devices in
    the argument's type.
    """
    if isinstance(weight, WeightNode):
        return weight.as_shard_map_argument()
    return in_float32(weight)


def split_axes(weight: Weight, axes: Axes, inner: Any = None) -> Any:
    """Returns `axes`, or a node of them, one for each leaf; see `WeightNode.split_axes`."""
    if isinstance(weight, WeightNode):
        return weight.split_axes(axes, inner)
    return axes


def constrain_weight(weight: Weight, names: tuple[str | None, ...]) -> Weight:
    """Lays a weight out by its logical axes, as `parallel.rules.constrain` does with an
    activation.
    """
    if not isinstance(weight, WeightNode):
        return constrain(weight, names)
    leaf_names = weight.split_axes(names, None)
    return jax.tree.map(constrain, weight, leaf_names)

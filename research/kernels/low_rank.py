"""A weight with a low-rank difference: W = base + a b."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from research.core.trees import node
from research.kernels.grouped_matmul import grouped_matmul
from research.kernels.projection import project
from research.kernels.weights import Axes, WeightNode


@node(static=())
@dataclasses.dataclass(frozen=True)
class LowRank(WeightNode):
    """base + a b, with the product never computed: x W = x base + (x a) b.

    Leading axes that all three share (layers, experts) are not contracted.

    Attributes:
      base: the plain weight, inputs first.
      a: `[stacks..., inputs..., R]`.
      b: `[stacks..., R, outputs...]`.

    Source: Hu et al. 2021 (LoRA), arXiv:2106.09685, equation 3; a scale of the product is part of
        `a` or `b`.
    """

    base: Float[Array, "..."]
    a: Float[Array, "..."]
    b: Float[Array, "..."]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the plain weight."""
        return self.base.shape

    @property
    def dtype(self) -> Any:
        """The type of the plain weight."""
        return self.base.dtype

    @property
    def _stacks(self) -> int:
        """How many leading axes are shared: a has them, its inputs and R; b has them, R and its
        outputs.
        """
        return self.a.ndim + self.b.ndim - 2 - self.base.ndim

    def as_array(self) -> Float[Array, "..."]:
        """Returns the plain weight."""
        stacks = self.base.shape[: self._stacks]
        rank = self.a.shape[-1]
        inputs = math.prod(self.a.shape[len(stacks) : -1])
        # [stacks, inputs, R] [stacks, R, outputs] -> [stacks, inputs, outputs]
        a = self.a.reshape(*stacks, inputs, rank)
        b = self.b.reshape(*stacks, rank, -1)
        product = jnp.matmul(a, b)
        return self.base + product.reshape(self.base.shape).astype(self.base.dtype)

    def project(
        self, x: Float[Array, "..."], axes: int, implementation: str
    ) -> Float[Array, "..."]:
        """Returns x base + (x a) b."""
        plain = project(x, self.base, axes=axes, implementation=implementation)
        narrow = project(x, self.a, axes=axes, implementation=implementation)
        return plain + project(narrow, self.b, implementation=implementation)

    def grouped_matmul(
        self, x: Float[Array, "rows D"], group_sizes: Int[Array, "E"], implementation: str
    ) -> Float[Array, "rows F"]:
        """Returns x_e base_e + (x_e a_e) b_e of each group."""
        plain = grouped_matmul(x, self.base, group_sizes, implementation=implementation)
        narrow = grouped_matmul(x, self.a, group_sizes, implementation=implementation)
        return plain + grouped_matmul(narrow, self.b, group_sizes, implementation=implementation)

    def einsum(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the contraction with base, and that with a and b one after the other."""
        # "BTNH,CNH->BTNC" with inputs C of the weight -> "BTNH,CZ,ZNH->BTNC"
        operands, result = equation.split("->")
        of_x, of_weight = operands.split(",")
        inputs = self.a.ndim - 1
        rank = "Z"
        assert rank not in equation, f"{rank} stands for the rank: {equation}"
        assert not self._stacks, "a layer or an expert is indexed before"
        low = f"{of_x},{of_weight[:inputs]}{rank},{rank}{of_weight[inputs:]}->{result}"
        plain = jnp.einsum(equation, x, self.base.astype(x.dtype))
        return plain + jnp.einsum(low, x, self.a.astype(x.dtype), self.b.astype(x.dtype))

    def take_rows(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Returns base[ids] + a[ids] b."""
        return self.base[ids] + (self.a[ids] @ self.b).astype(self.base.dtype)

    def transpose(self) -> "LowRank":
        """Returns baseᵀ + bᵀ aᵀ."""
        return LowRank(self.base.T, self.b.T, self.a.T)

    def append_row(self, row: Float[Array, "F"]) -> "LowRank":
        """Returns the matrix with one more row, to which the product adds nothing."""
        base = jnp.concatenate([self.base, row[None]], axis=0)
        return LowRank(base, jnp.pad(self.a, ((0, 1), (0, 0))), self.b)

    def as_product(
        self, x: Float[Array, "*batch D"]
    ) -> tuple[Float[Array, "*batch E"], Float[Array, "E F"]]:
        """Returns [x, x a] and [base; b], one above the other."""
        narrow = x @ self.a.astype(x.dtype)
        b = self.b.astype(self.base.dtype)
        return jnp.concatenate([x, narrow], axis=-1), jnp.concatenate([self.base, b], axis=0)

    def split_axes(self, axes: Axes, inner: Any) -> "LowRank":
        """Returns the node of the axes of base, a and b."""
        stacks = self._stacks
        inputs = self.a.ndim - 1
        # A partition may leave out trailing axes.
        missing = self.base.ndim - len(axes)
        full = (*axes, *(None,) * missing)

        # ("layers", "embed", "mlp") -> a ("layers", "embed", inner), b ("layers", inner, "mlp")
        of_a = (*full[:inputs], inner)
        of_b = (*full[:stacks], inner, *full[inputs:])
        if isinstance(axes, PartitionSpec):
            of_a = PartitionSpec(*of_a)
            of_b = PartitionSpec(*of_b)
        return jax.tree.unflatten(jax.tree.structure(self), (axes, of_a, of_b))

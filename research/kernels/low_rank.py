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
        # a [L, D, R], b [L, R, N, H], base [L, D, N, H]: 3 + 4 - 2 - 4 = 1
        without_rank = self.a.ndim + self.b.ndim - 2
        return without_rank - self.base.ndim

    def as_array(self) -> Float[Array, "..."]:
        """Returns the plain weight."""
        num_stacks = self._stacks
        stacks = self.base.shape[:num_stacks]
        *inputs, rank = self.a.shape[num_stacks:]
        # [stacks, inputs, R] [stacks, R, outputs] -> [stacks, inputs, outputs]
        a = self.a.reshape(*stacks, math.prod(inputs), rank)
        b = self.b.reshape(*stacks, rank, -1)
        product = jnp.matmul(a, b)
        difference = product.reshape(self.shape)
        return self.base + difference.astype(self.dtype)

    def project(
        self, x: Float[Array, "..."], axes: int, implementation: str
    ) -> Float[Array, "..."]:
        """Returns x base + (x a) b."""
        plain = project(x, self.base, axes=axes, implementation=implementation)
        # [B, T, D] -> [B, T, R] -> [B, T, F]
        narrow = project(x, self.a, axes=axes, implementation=implementation)
        difference = project(narrow, self.b, implementation=implementation)
        return plain + difference

    def grouped_matmul(
        self, x: Float[Array, "rows D"], group_sizes: Int[Array, "E"], implementation: str
    ) -> Float[Array, "rows F"]:
        """Returns x_e base_e + (x_e a_e) b_e of each group."""
        plain = grouped_matmul(x, self.base, group_sizes, implementation=implementation)
        # [rows, D] -> [rows, R] -> [rows, F]
        narrow = grouped_matmul(x, self.a, group_sizes, implementation=implementation)
        difference = grouped_matmul(narrow, self.b, group_sizes, implementation=implementation)
        return plain + difference

    def einsum(self, equation: str, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the contraction with base, and that with a and b one after the other."""
        # "BTNH,CNH->BTNC" with inputs C of the weight -> "BTNH,CZ,ZNH->BTNC"
        operands, result = equation.split("->")
        of_x, of_weight = operands.split(",")
        inputs = self.a.ndim - 1
        rank = "Z"
        assert rank not in equation, f"{rank} stands for the rank: {equation}"
        assert not self._stacks, "a layer or an expert is indexed before"
        of_a = of_weight[:inputs] + rank
        of_b = rank + of_weight[inputs:]
        low_rank = f"{of_x},{of_a},{of_b}->{result}"

        base = self.base.astype(x.dtype)
        plain = jnp.einsum(equation, x, base)
        a = self.a.astype(x.dtype)
        b = self.b.astype(x.dtype)
        return plain + jnp.einsum(low_rank, x, a, b)

    def take_rows(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
        """Returns base[ids] + a[ids] b."""
        plain = self.base[ids]
        # [..., R] [R, D] -> [..., D]
        narrow = self.a[ids]
        difference = narrow @ self.b
        return plain + difference.astype(self.dtype)

    def transpose(self) -> "LowRank":
        """Returns baseᵀ + bᵀ aᵀ."""
        return LowRank(self.base.T, self.b.T, self.a.T)

    def append_row(self, row: Float[Array, "F"]) -> "LowRank":
        """Returns the matrix with one more row, to which the product adds nothing."""
        # a [D, R] -> [D + 1, R], with zeros in the new row
        base = jnp.concatenate([self.base, row[None]], axis=0)
        a = jnp.pad(self.a, ((0, 1), (0, 0)))
        return LowRank(base, a, self.b)

    def as_product(
        self, x: Float[Array, "*batch D"]
    ) -> tuple[Float[Array, "*batch E"], Float[Array, "E F"]]:
        """Returns [x, x a] and [base; b], one above the other."""
        # [B, D] and [D, F] -> [B, D + R] and [D + R, F]
        a = self.a.astype(x.dtype)
        narrow = x @ a
        b = self.b.astype(self.dtype)
        wide = jnp.concatenate([x, narrow], axis=-1)
        weight = jnp.concatenate([self.base, b], axis=0)
        return wide, weight

    def split_axes(self, axes: Axes, inner: Any) -> "LowRank":
        """Returns the node of the axes of base, a and b."""
        stacks = self._stacks
        inputs = self.a.ndim - 1
        # A partition may leave out trailing axes.
        missing = self.base.ndim - len(axes)
        trailing = (None,) * missing
        full = (*axes, *trailing)

        # ("layers", "embed", "mlp") -> a ("layers", "embed", inner), b ("layers", inner, "mlp")
        of_a = (*full[:inputs], inner)
        of_b = (*full[:stacks], inner, *full[inputs:])
        if isinstance(axes, PartitionSpec):
            of_a = PartitionSpec(*of_a)
            of_b = PartitionSpec(*of_b)
        structure = jax.tree.structure(self)
        return jax.tree.unflatten(structure, (axes, of_a, of_b))

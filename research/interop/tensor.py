"""How one tensor of a checkpoint holds parameters: the same numbers in another order, so every way
back is bitwise.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int, Shaped

from research.models.config import ModelConfig

Shape = tuple[int, ...]
# Sides of the square tiles in which matrices are transposed: both sides of a tile lie in the cache.
_TILE = 256
# The most bytes of a tensor that are compared at once.
_COMPARED_BYTES = 2**25


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint and the parameters that it holds.

    Attributes:
      theirs: its name; `{layer}` stands for the number of a layer. Where it holds `{expert}` there
        is one tensor an expert, and each is a slice of the parameters' leading axis. `{mtp}`
        stands for the number of a layer that
        predicts a further token: these are counted on after the others.
      ours: the parameters whose output axes lie in it one after the other; `{layer}` stands for the
        layer's subtree, `layers_0` for instance, and what is before it says which stack is meant
        (`encoder/{layer}/…`); `{mtp}` for that of a predictor.
      num_inputs: how many leading axes of a parameter (those of an expert, without their own) are
        inputs; the others are outputs, and both are made one axis. 0 for vectors.
      transposed: whether outputs come first, as in torch's `Linear`.
      experts: whether the leading axis of the parameters is that of experts, and of the tensor's,
          too.
      order: returns for a model which of the parameters' joined outputs each output of the tensor
        is; None where they lie as they are.
      unsqueezed: whether the tensor has one more axis of size 1 in front.
      when: tells the models that have it, where its parameters alone do not; None is all.
      copy: whether it repeats the tensor of the same parameters that is none: written, as that one
        is; read, it may be missing, and must be equal.
    """

    theirs: str
    ours: tuple[str, ...]
    num_inputs: int = 0
    transposed: bool = False
    experts: bool = False
    order: Callable[[ModelConfig], Int[np.ndarray, "outputs"]] | None = None
    unsqueezed: bool = False
    when: Callable[[ModelConfig], bool] | None = None
    copy: bool = False


@dataclasses.dataclass(frozen=True)
class TensorMapping:
    """A tensor of one model and layer.

    It can be cut along the axis of the parameters that leads in the tensor, too, so that no more
    than a part of a large one need be in memory.

    Attributes:
      spec: what it is.
      theirs: its name; or those of all experts.
      ours: the parameters.
      shapes: of the parameters.
      order: see `TensorSpec`.
    """

    spec: TensorSpec
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    shapes: tuple[Shape, ...]
    order: Int[np.ndarray, "outputs"] | None

    @property
    def _by_expert(self) -> bool:
        return "{expert}" in self.spec.theirs

    @property
    def _has_experts(self) -> bool:
        return self._by_expert or self.spec.experts

    def shape(self) -> Shape:
        """Returns the shape of the tensor; of one expert's where each has its own."""
        shape = self._matrix_shape(self._inner(self.shapes))
        if self.spec.experts and not self._by_expert:
            shape = (self.shapes[0][0], *shape)
        return (1, *shape) if self.spec.unsqueezed else shape

    def cuts(self, limit: int) -> list[slice | None]:
        """Returns ranges of the leading axis, each of at most `limit` bytes of float32; [None] is
        the whole tensor.
        """
        axis = self._axis()
        if axis is None:
            return [None]
        size = self.shapes[0][axis]
        row = 4 * sum(map(math.prod, self.shapes)) // max(size, 1)
        # A power of two: the pieces in which checkpoints are stored are powers of two as well, so
        # none is cut in two.
        rows = 1 << max(limit // max(row, 1), 1).bit_length() - 1
        if rows >= size:
            return [None]
        return [slice(start, min(start + rows, size)) for start in range(0, size, rows)]

    def slices(self, cut: slice | None) -> tuple[slice, ...]:
        """Returns where a cut lies in each of the parameters."""
        if cut is None:
            return ()
        return (*[slice(None)] * self._axis(), cut)

    def unpack(
        self, tensors: Mapping[str, Any], cut: slice | None
    ) -> list[Float32[np.ndarray, "..."]]:
        """Returns a cut of each parameter.

        Args:
          tensors: arrays, or what `np.asarray` makes one.
          cut: one of `cuts`.
        """
        if self._has_experts:
            cut = slice(0, self.shapes[0][0]) if cut is None else cut
            parts = [
                np.empty((cut.stop - cut.start, *shape[1:]), np.float32) for shape in self.shapes
            ]
            for row, expert in enumerate(range(cut.start, cut.stop)):
                if self._by_expert:
                    matrix = np.asarray(tensors[self.theirs[expert]])
                else:
                    matrix = np.asarray(tensors[self.theirs[0]])[expert]
                for part, value in zip(
                    parts, self._unpack(matrix, self._inner(self.shapes)), strict=True
                ):
                    part[row] = value
            return parts
        value = np.asarray(tensors[self.theirs[0]])
        value = value[0] if self.spec.unsqueezed else value
        if cut is None:
            return self._unpack(value, self.shapes)
        axis, (shape,) = self._axis(), self.shapes
        group = (
            shape[axis + 1 :]
            if axis == self.spec.num_inputs
            else shape[axis + 1 : self.spec.num_inputs]
        )
        rows = slice(cut.start * math.prod(group), cut.stop * math.prod(group))
        return self._unpack(
            value[rows], ((*shape[:axis], cut.stop - cut.start, *shape[axis + 1 :]),)
        )

    def pack(
        self, parameters: list[Float[np.ndarray, "..."]], cut: slice | None, dtype: np.dtype
    ) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
        """Yields names of tensors and the next rows of each; the inverse of `unpack`."""
        if not self._has_experts:
            yield self.theirs[0], self._pack(parameters, dtype)
            return
        first = 0 if cut is None else cut.start
        for row in range(len(parameters[0])):
            name = self.theirs[first + row] if self._by_expert else self.theirs[0]
            yield name, self._pack([value[row] for value in parameters], dtype)

    def _axis(self) -> int | None:
        """The axis of the parameters that leads in the tensor; None where the tensor must stay
        whole.
        """
        if self._has_experts:
            return 0
        if len(self.ours) > 1 or self.order is not None or not self.shapes[0]:
            return None
        return self.spec.num_inputs if self.spec.transposed else 0

    def _inner(self, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        return tuple(shape[1:] for shape in shapes) if self._has_experts else shapes

    def _pack(
        self, parameters: list[Float[np.ndarray, "..."]], dtype: np.dtype
    ) -> Shaped[np.ndarray, "..."]:
        flat = [value.reshape(self._flat_shape(value.shape)) for value in parameters]
        packed = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=-1)
        packed = packed if self.order is None else packed[..., self.order]
        return contiguous(packed.T if self.spec.transposed else packed, dtype)

    def _unpack(
        self, matrix: Shaped[np.ndarray, "..."], shapes: tuple[Shape, ...]
    ) -> list[Float32[np.ndarray, "..."]]:
        matrix = matrix.T if self.spec.transposed else matrix
        matrix = matrix if self.order is None else matrix[..., np.argsort(self.order)]
        ends = np.cumsum([self._flat_shape(shape)[-1] for shape in shapes])
        parts = np.split(matrix, ends[:-1], axis=-1)
        return [
            contiguous(part, np.float32).reshape(shape)
            for part, shape in zip(parts, shapes, strict=True)
        ]

    def _matrix_shape(self, shapes: tuple[Shape, ...]) -> Shape:
        flat = [self._flat_shape(shape) for shape in shapes]
        shape = (*flat[0][:-1], sum(each[-1] for each in flat))
        return shape[::-1] if self.spec.transposed else shape

    def _flat_shape(self, shape: Shape) -> Shape:
        inputs = (math.prod(shape[: self.spec.num_inputs]),) if self.spec.num_inputs else ()
        return (*inputs, math.prod(shape[self.spec.num_inputs :]))


def contiguous(x: Shaped[np.ndarray, "..."], dtype: Any) -> Shaped[np.ndarray, "..."]:
    """Returns `x` row by row in a type; without a copy where it is so already.

    NumPy copies a transposed matrix along one of its sides, where the other side misses the cache
    at each step; tiles are about three times as fast.
    """
    if x.ndim != 2 or x.flags.c_contiguous:
        return np.ascontiguousarray(x, dtype)
    out = np.empty(x.shape, dtype)
    for i in range(0, x.shape[0], _TILE):
        for j in range(0, x.shape[1], _TILE):
            out[i : i + _TILE, j : j + _TILE] = x[i : i + _TILE, j : j + _TILE]
    return out


def same_numbers(a: Any, b: Any) -> bool:
    """Returns whether two tensors have the same bits, or the same numbers in types of their own; a
    slice at a time.
    """
    if a.shape != b.shape:
        return False
    if a.dtype == b.dtype:
        common, read_as = a.dtype, f"u{a.dtype.itemsize}"
    elif jnp.issubdtype(a.dtype, jnp.floating) and jnp.issubdtype(b.dtype, jnp.floating):
        common = read_as = np.dtype(np.float64)  # which holds the numbers of all of them
    else:
        return False
    a, b = np.asarray(a), np.asarray(b)
    rows = max(1, _COMPARED_BYTES // max(1, a[:1].nbytes, b[:1].nbytes))

    def part(x: Shaped[np.ndarray, "..."], start: int) -> Shaped[np.ndarray, "..."]:
        return x[start : start + rows].astype(common, copy=False).view(read_as)

    equal_nan = read_as == common  # bits of integers have none
    return all(
        np.array_equal(part(a, i), part(b, i), equal_nan=equal_nan) for i in range(0, len(a), rows)
    )

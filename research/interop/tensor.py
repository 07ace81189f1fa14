"""The parameters in one tensor of a checkpoint: the same numbers in another order, so that reading
and writing are bitwise.
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
# Sides of the square tiles in which matrices are transposed: both sides of a tile fit the cache.
_TILE = 256
# The most bytes of a tensor that are compared at once.
_COMPARED_BYTES = 2**25


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One tensor of a checkpoint and the parameters in it; of a tensor of layers, one for all.

    Attributes:
      theirs: name of the tensor. `{layer}` is replaced by the number of a layer, `{mtp}` by that of
        a multi-token prediction layer, which is counted on after the others. With `{expert}` there
        is one tensor for each expert, a slice of the parameters' leading axis.
      ours: names of the parameters whose output axes are concatenated in the tensor. `{layer}` is
        replaced by the subtree of a layer, `layers_0` for instance, and the text before it names
        the stack (`encoder/{layer}/…`); `{mtp}` by the subtree of a multi-token prediction layer.
      num_inputs: how many leading axes of a parameter (of an expert's, without the expert axis) are
        inputs; the others are outputs. Inputs and outputs become one axis each. 0 for vectors.
      transposed: whether outputs come first, as in torch's `Linear`.
      experts: whether both the parameters and the tensor have a leading axis of experts.
      order: returns for a model which of the parameters' concatenated outputs each output of the
        tensor is; None where their order is the same.
      unsqueezed: whether the tensor has a leading axis of size 1 more.
      when: returns whether a model has the tensor, where its parameters do not decide it; None is
        all models.
      copy: whether it repeats another tensor of the same parameters. Copies are written; read, they
        may be missing, and must be equal to the original.
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
    """The parameters in a tensor of one model and layer.

    Large tensors are read and written in cuts along their leading axis, so that only a part of
    them need be in memory.

    Attributes:
      spec: what it is.
      theirs: name of the tensor, or of the tensors of all experts.
      ours: names of the parameters.
      shapes: of the parameters.
      order: see `TensorSpec`.
    """

    spec: TensorSpec
    theirs: tuple[str, ...]
    ours: tuple[str, ...]
    shapes: tuple[Shape, ...]
    order: Int[np.ndarray, "outputs"] | None

    @property
    def _is_split_by_expert(self) -> bool:
        return "{expert}" in self.spec.theirs

    @property
    def _has_experts(self) -> bool:
        return self._is_split_by_expert or self.spec.experts

    def shape(self) -> Shape:
        """Returns the shape of the tensor; of one expert's where each has its own."""
        shape = self._matrix_shape(self._shapes_without_experts())
        if self.spec.experts and not self._is_split_by_expert:
            num_experts = self.shapes[0][0]
            shape = (num_experts, *shape)
        if self.spec.unsqueezed:
            shape = (1, *shape)
        return shape

    def cuts(self, limit: int) -> list[slice | None]:
        """Returns ranges of the leading axis, each of at most `limit` bytes of float32; [None] is
        the whole tensor.
        """
        axis = self._cut_axis()
        if axis is None:
            return [None]

        size = self.shapes[0][axis]
        total_bytes = 4 * sum(map(math.prod, self.shapes))
        row_bytes = max(total_bytes // max(size, 1), 1)
        # A power of two: the chunks of stored checkpoints are powers of two as well, so that none
        # is cut in two. A limit of 20 rows -> 16.
        most_rows = max(limit // row_bytes, 1)
        rows = 1 << most_rows.bit_length() - 1
        if rows >= size:
            return [None]
        # Size 10, 4 rows -> 0:4, 4:8, 8:10
        starts = range(0, size, rows)
        return [slice(start, min(start + rows, size)) for start in starts]

    def slices(self, cut: slice | None) -> tuple[slice, ...]:
        """Returns where a cut is in each of the parameters."""
        if cut is None:
            return ()
        axes_before = [slice(None)] * self._cut_axis()
        return (*axes_before, cut)

    def unpack(
        self, tensors: Mapping[str, Any], cut: slice | None
    ) -> list[Float32[np.ndarray, "..."]]:
        """Returns a cut of each parameter.

        Args:
          tensors: arrays, or what `np.asarray` makes one.
          cut: one of `cuts`.
        """
        if self._has_experts:
            return self._unpack_experts(tensors, cut)

        value = np.asarray(tensors[self.theirs[0]])
        if self.spec.unsqueezed:
            value = value[0]
        if cut is None:
            return self._unpack_matrix(value, self.shapes)
        return self._unpack_rows(value, cut)

    def pack(
        self, parameters: list[Float[np.ndarray, "..."]], cut: slice | None, dtype: np.dtype
    ) -> Iterator[tuple[str, Shaped[np.ndarray, "..."]]]:
        """Yields names of tensors and the next rows of each; the inverse of `unpack`."""
        if not self._has_experts:
            yield self.theirs[0], self._pack_matrix(parameters, dtype)
            return

        first = 0 if cut is None else cut.start
        for row in range(len(parameters[0])):
            name = self.theirs[first + row] if self._is_split_by_expert else self.theirs[0]
            expert = [value[row] for value in parameters]
            yield name, self._pack_matrix(expert, dtype)

    def _cut_axis(self) -> int | None:
        """The axis of the parameters that leads in the tensor; None where the tensor must stay
        whole.
        """
        if self._has_experts:
            return 0
        # Concatenated or reordered outputs are spread over the whole tensor.
        if len(self.ours) > 1 or self.order is not None:
            return None
        if not self.shapes[0]:
            return None
        return self.spec.num_inputs if self.spec.transposed else 0

    def _shapes_without_experts(self) -> tuple[Shape, ...]:
        """The shapes of the parameters in one matrix: without their axis of experts."""
        if not self._has_experts:
            return self.shapes
        return tuple(shape[1:] for shape in self.shapes)

    def _unpack_experts(
        self, tensors: Mapping[str, Any], cut: slice | None
    ) -> list[Float32[np.ndarray, "..."]]:
        experts = range(self.shapes[0][0])
        if cut is not None:
            experts = experts[cut]

        shapes = self._shapes_without_experts()
        parameters = [np.empty((len(experts), *shape), np.float32) for shape in shapes]
        for row, expert in enumerate(experts):
            matrix = self._expert_matrix(tensors, expert)
            values = self._unpack_matrix(matrix, shapes)
            for parameter, value in zip(parameters, values, strict=True):
                parameter[row] = value
        return parameters

    def _expert_matrix(self, tensors: Mapping[str, Any], expert: int) -> Shaped[np.ndarray, "..."]:
        if self._is_split_by_expert:
            return np.asarray(tensors[self.theirs[expert]])
        all_experts = np.asarray(tensors[self.theirs[0]])
        return all_experts[expert]

    def _unpack_rows(
        self, matrix: Shaped[np.ndarray, "..."], cut: slice
    ) -> list[Float32[np.ndarray, "..."]]:
        """Returns a cut of the one parameter in a matrix."""
        axis = self._cut_axis()
        (shape,) = self.shapes
        # Inputs and outputs are one axis each: query/kernel [D, N, H] is [N · H, D] in torch, so
        # that a cut of heads 2:4 with H = 128 is rows 256:512.
        ends_at = len(shape) if axis == self.spec.num_inputs else self.spec.num_inputs
        rows_each = math.prod(shape[axis + 1 : ends_at])
        rows = slice(cut.start * rows_each, cut.stop * rows_each)

        cut_shape = list(shape)
        cut_shape[axis] = cut.stop - cut.start
        return self._unpack_matrix(matrix[rows], (tuple(cut_shape),))

    def _unpack_matrix(
        self, matrix: Shaped[np.ndarray, "..."], shapes: tuple[Shape, ...]
    ) -> list[Float32[np.ndarray, "..."]]:
        """Returns the parameters in a matrix; a vector stays one throughout."""
        if self.spec.transposed:
            matrix = matrix.T
        if self.order is not None:
            matrix = matrix[..., np.argsort(self.order)]

        # [inputs, outputs of all parameters] -> one [inputs, outputs] for each
        widths = [self._flat_shape(shape)[-1] for shape in shapes]
        ends = np.cumsum(widths)
        parts = np.split(matrix, ends[:-1], axis=-1)
        parameters = []
        for part, shape in zip(parts, shapes, strict=True):
            values = contiguous(part, np.float32)
            parameters.append(values.reshape(shape))
        return parameters

    def _pack_matrix(
        self, parameters: list[Float[np.ndarray, "..."]], dtype: np.dtype
    ) -> Shaped[np.ndarray, "..."]:
        """Returns the matrix of parameters; the inverse of `_unpack_matrix`."""
        flat = [value.reshape(self._flat_shape(value.shape)) for value in parameters]
        # One [inputs, outputs] for each parameter -> [inputs, outputs of all of them]
        matrix = flat[0] if len(flat) == 1 else np.concatenate(flat, axis=-1)
        if self.order is not None:
            matrix = matrix[..., self.order]
        if self.spec.transposed:
            matrix = matrix.T
        return contiguous(matrix, dtype)

    def _matrix_shape(self, shapes: tuple[Shape, ...]) -> Shape:
        flat = [self._flat_shape(shape) for shape in shapes]
        outputs = sum(shape[-1] for shape in flat)
        shape = (*flat[0][:-1], outputs)
        return shape[::-1] if self.spec.transposed else shape

    def _flat_shape(self, shape: Shape) -> Shape:
        """Returns the shape with inputs and outputs as one axis each."""
        num_inputs = self.spec.num_inputs
        outputs = math.prod(shape[num_inputs:])
        if not num_inputs:
            return (outputs,)
        # out/kernel [N, H, D] with two inputs -> [N · H, D]
        inputs = math.prod(shape[:num_inputs])
        return inputs, outputs


def contiguous(x: Shaped[np.ndarray, "..."], dtype: Any) -> Shaped[np.ndarray, "..."]:
    """Returns `x` row by row in a type; without a copy where it is so already.

    NumPy copies a transposed matrix along one of its sides, where the other side misses the cache
    at each step; tiles are about three times as fast.
    """
    if x.ndim != 2 or x.flags.c_contiguous:
        return np.ascontiguousarray(x, dtype)

    out = np.empty(x.shape, dtype)
    num_rows, num_columns = x.shape
    for row in range(0, num_rows, _TILE):
        for column in range(0, num_columns, _TILE):
            tile = slice(row, row + _TILE), slice(column, column + _TILE)
            out[tile] = x[tile]
    return out


def same_numbers(a: Any, b: Any) -> bool:
    """Returns whether two tensors have the same bits, or the same numbers in types of their own.

    They are read and compared a slice at a time.
    """
    if a.shape != b.shape:
        return False

    both_floating = _is_floating(a) and _is_floating(b)
    if a.dtype == b.dtype:
        # As integers of the same width, so that NaNs are compared by their bits, too.
        common = a.dtype
        view = np.dtype(f"u{a.dtype.itemsize}")
    elif both_floating:
        # float64 holds the numbers of all other types.
        common = np.dtype(np.float64)
        view = common
    else:
        return False

    a = np.asarray(a)
    b = np.asarray(b)
    row_bytes = max(1, a[:1].nbytes, b[:1].nbytes)
    rows = max(1, _COMPARED_BYTES // row_bytes)
    for start in range(0, len(a), rows):
        a_rows = a[start : start + rows].astype(common, copy=False).view(view)
        b_rows = b[start : start + rows].astype(common, copy=False).view(view)
        if not np.array_equal(a_rows, b_rows, equal_nan=view.kind == "f"):
            return False
    return True


def _is_floating(tensor: Any) -> bool:
    return jnp.issubdtype(tensor.dtype, jnp.floating)

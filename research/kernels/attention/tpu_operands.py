"""The operands of the TPU kernels: arrays, their blocks, and the names under which a kernel finds
them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms

# Read one number a row of the batch, or a head.
_PER_ROW, _PER_HEAD = ("prefix",), ("alibi", "sinks")


class Operands:
    """A growing list of operands, with index maps of the kernel's choosing."""

    def __init__(self, mask: AttentionMask, terms: ScoreTerms, axes: Sequence[int]):
        self._mask, self._terms, self._axes = mask, terms, axes
        self.names: tuple[str, ...] = ()
        self.arrays: list[Array] = []
        self.specs: list[pl.BlockSpec] = []

    @classmethod
    def of(cls, mask: AttentionMask, terms: ScoreTerms, axes: Sequence[int]) -> "Operands":
        """Returns the operands that every kernel of a call has: single numbers of its mask and
        terms.

        Args:
          mask, terms: of the call.
          axes: where each index of the index maps stands in the kernel's grid; the first is the row
              of the batch.
        """
        operands = cls(mask, terms, axes)
        for name, array, kind in (
            ("prefix", mask.prefix, jnp.int32),
            ("alibi", terms.alibi, jnp.float32),
            ("sinks", terms.sinks, jnp.float32),
        ):
            if array is not None:
                spec = pl.BlockSpec(memory_space=pltpu.SMEM)
                operands._append(name, array.astype(kind), spec)
        return operands

    def _append(self, name: str, array: Array, spec: pl.BlockSpec) -> None:
        self.names += (name,)
        self.arrays.append(array)
        self.specs.append(spec)

    def spec(self, block: tuple[int, ...], index: Callable[..., tuple]) -> pl.BlockSpec:
        """Returns blocks of an array, found by the indices in the order of the index maps."""
        return pl.BlockSpec(block, lambda *grid: index(*(grid[axis] for axis in self._axes)))

    def add(
        self, name: str, array: Array, block: tuple[int, ...], index: Callable[..., tuple]
    ) -> None:
        """Adds an array in blocks."""
        self._append(name, array, self.spec(block, index))

    def add_tokens(self, prefix: str, block: int, index: Callable[..., Any]) -> None:
        """Adds the positions and segments of one side, `q` or `kv`, where the mask has them, as
        rows of lanes.
        """
        for name in (f"{prefix}_positions", f"{prefix}_segments"):
            array = getattr(self._mask, name)
            if array is not None:
                self.add(
                    name,
                    array.astype(jnp.int32)[:, None],
                    (1, 1, block),
                    lambda *g: (g[0], 0, index(*g)),
                )

    def add_bias(self, queries: int, keys: int, index: Callable[..., tuple]) -> None:
        """Adds the bias where there is one; `index` gives batch row, head, block of queries and
        block of keys.
        """
        bias = self._terms.bias
        if bias is None:
            return

        def where(*grid: Any) -> tuple:
            return tuple(
                at if size > 1 else 0 for at, size in zip(index(*grid), bias.shape, strict=True)
            )

        block = (1, 1, queries if bias.shape[2] > 1 else 1, keys if bias.shape[3] > 1 else 1)
        self.add("bias", bias, block, where)


def gather(names: Sequence[str], inputs: Sequence[Any], batch: Any, head: Any) -> dict[str, Any]:
    """Returns a kernel's operands by name; single numbers are read."""
    refs = dict(zip(names, inputs, strict=True))
    for name in refs:
        if name in _PER_ROW:
            refs[name] = refs[name][batch]
        elif name in _PER_HEAD:
            refs[name] = refs[name][head]
    return refs


def bias_tile(ref: Any, rows: Any, columns: Any) -> Array:
    """Returns part of a block of the bias, of which an axis that is broadcast has one element."""
    one = slice(0, 1)
    return ref[0, 0, rows if ref.shape[2] > 1 else one, columns if ref.shape[3] > 1 else one]

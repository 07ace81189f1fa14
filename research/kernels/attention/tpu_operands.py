"""The operands of the TPU kernels: arrays, their blocks, and the names by which a kernel gets
them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms

# Vectors in SMEM with one scalar for each row of the batch, or for each head.
SCALARS_OF_ROWS = ("prefix",)
SCALARS_OF_HEADS = ("alibi", "sinks")


class Operands:
    """A growing list of operands, with index maps that the kernel chooses."""

    def __init__(self, mask: AttentionMask, terms: ScoreTerms, grid_axes: Sequence[int]):
        self._mask = mask
        self._terms = terms
        self._grid_axes = grid_axes
        self.names: tuple[str, ...] = ()
        self.arrays: list[Array] = []
        self.specs: list[pl.BlockSpec] = []

    @classmethod
    def of(cls, mask: AttentionMask, terms: ScoreTerms, grid_axes: Sequence[int]) -> "Operands":
        """Returns the operands that every kernel of a call has: scalars of its mask and terms.

        Args:
          mask, terms: of the call.
          grid_axes: the axis of the kernel's grid for each argument of the index maps; the first
            argument is the row of the batch.
        """
        operands = cls(mask, terms, grid_axes)
        scalars = (
            ("prefix", mask.prefix, jnp.int32),
            ("alibi", terms.alibi, jnp.float32),
            ("sinks", terms.sinks, jnp.float32),
        )
        # Whole vectors: a kernel reads the scalar of its row or head.
        for name, array, dtype in scalars:
            if array is not None:
                spec = pl.BlockSpec(memory_space=pltpu.SMEM)
                operands._append(name, array.astype(dtype), spec)
        return operands

    def _append(self, name: str, array: Array, spec: pl.BlockSpec) -> None:
        self.names += (name,)
        self.arrays.append(array)
        self.specs.append(spec)

    def spec(self, block: tuple[int, ...], index_map: Callable[..., tuple]) -> pl.BlockSpec:
        """Returns the blocks of an array, for an index map that is independent of the grid."""

        # Grid axes (2, 0, 1): step (7, 8, 9) of the grid -> index_map(9, 7, 8)
        def grid_index_map(*step: Any) -> tuple:
            indices = [step[axis] for axis in self._grid_axes]
            return index_map(*indices)

        return pl.BlockSpec(block, grid_index_map)

    def add(
        self, name: str, array: Array, block: tuple[int, ...], index_map: Callable[..., tuple]
    ) -> None:
        """Adds an array in blocks."""
        spec = self.spec(block, index_map)
        self._append(name, array, spec)

    def add_tokens(self, side: str, block: int, token_block: Callable[..., Any]) -> None:
        """Adds positions and segments where the mask has them, as rows of lanes.

        Args:
          side: `q` or `kv`.
          block: tokens of a block.
          token_block: the index map of the blocks of tokens.
        """

        # Block 3 of the tokens of row 1 of [B, 1, tokens] -> (1, 0, 3)
        def index_map(row: Any, *indices: Any) -> tuple:
            return row, 0, token_block(row, *indices)

        for name in (f"{side}_positions", f"{side}_segments"):
            array = getattr(self._mask, name)
            if array is not None:
                # [B, tokens] -> [B, 1, tokens]
                array = array.astype(jnp.int32)
                self.add(name, array[:, None], (1, 1, block), index_map)

    def add_bias(self, queries: int, keys: int, index_map: Callable[..., tuple]) -> None:
        """Adds the bias where there is one.

        Args:
          queries, keys: of a block.
          index_map: of a bias that is not broadcast.
        """
        bias = self._terms.bias
        if bias is None:
            return

        # A bias [1, N, T, 1] has the blocks [1, 1, queries, 1], whatever the row and the key.
        def broadcast_index_map(*indices: Any) -> tuple:
            whole = zip(index_map(*indices), bias.shape, strict=True)
            return tuple(index if size > 1 else 0 for index, size in whole)

        _, _, bias_queries, bias_keys = bias.shape
        block_queries = queries if bias_queries > 1 else 1
        block_keys = keys if bias_keys > 1 else 1
        block = (1, 1, block_queries, block_keys)
        self.add("bias", bias, block, broadcast_index_map)


def refs_by_name(
    names: Sequence[str], inputs: Sequence[Any], row: Any, head: Any
) -> dict[str, Any]:
    """Returns a kernel's operands by name: references to blocks, and scalars as they are.

    Args:
      names: of the operands.
      inputs: references to them.
      row: of the batch.
      head: of the queries.
    """
    refs = dict(zip(names, inputs, strict=True))
    for name, ref in refs.items():
        if name in SCALARS_OF_ROWS:
            refs[name] = ref[row]
        elif name in SCALARS_OF_HEADS:
            refs[name] = ref[head]
    return refs


def bias_tile(refs: Mapping[str, Any], queries: Any, keys: Any) -> Array | None:
    """Returns part of a block of the bias, [T, S], in which a broadcast axis has one element.

    Args:
      refs: the kernel's operands.
      queries, keys: slices of the block.
    """
    if "bias" not in refs:
        return None
    # The bias of a block [1, 1, T, 1] is a column for all keys.
    ref = refs["bias"]
    _, _, bias_queries, bias_keys = ref.shape
    if bias_queries == 1:
        queries = slice(0, 1)
    if bias_keys == 1:
        keys = slice(0, 1)
    return ref[0, 0, queries, keys]

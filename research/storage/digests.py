"""Digests of arrays that do not depend on how the arrays are sharded.

    digest(x) = ( Σ_i m₁(x_i ⊕ h₁(i)) mod 2³²,  Σ_i m₂(x_i ⊕ h₂(i)) mod 2³² )

`x_i` are the bits of element `i`, its row-major index in the array. `h(i) = a i + b mod 2³²`
spreads the index, and `m₁`, `m₂` are bijections of 32-bit words. The order of a sum does not
matter, so every device adds up its own part and nothing is gathered. A change of one element, such
as a flipped bit, always changes both sums, because `m` is a bijection; other damage is missed with
probability 2⁻⁶⁴.

Source of the bijections: the finalizer of MurmurHash3 (Appleby 2011) and "lowbias32" of Wellons
2018, "Prospecting for hash functions".
"""

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped, UInt32

# Elements that a running digest takes at a time: few enough to stay in the cache between its steps.
_BLOCK = 2**16


class _Mix(NamedTuple):
    """The functions of one sum.

    Attributes:
      multiplier, offset: a (odd) and b of h(i) = a i + b.
      bijection: m, as shift, multiplier, shift, multiplier, shift.
    """

    multiplier: int
    offset: int
    bijection: tuple[int, int, int, int, int]


_MIXES = (
    _Mix(0x9E3779B1, 0x7F4A7C15, (16, 0x85EBCA6B, 13, 0xC2B2AE35, 16)),
    _Mix(0xB5297A4D, 0x68E31DA4, (16, 0x7FEB352D, 15, 0x846CA68B, 16)),
)


def digests(named: Mapping[str, Array]) -> dict[str, str]:
    """Returns 16 hexadecimal digits for each array.

    All processes that hold a part of an array must call this.
    """
    # All are started before the first is waited for.
    sums = {name: _digest_on_devices(leaf) for name, leaf in named.items()}
    return {name: _text(np.asarray(pair)) for name, pair in sums.items()}


class RunningDigest:
    """The digest of an array that comes in parts, each element once and in any order.

    It is taken with NumPy: parts have many shapes, and are on the host.
    """

    def __init__(self, shape: tuple[int, ...]):
        self._shape = shape
        self._sums = [0, 0]
        self._left = math.prod(shape)

    def add(self, part: Shaped[np.ndarray, "..."], start: tuple[int, ...]) -> None:
        """Adds the part whose first element has the indices `start` in the array."""
        self._left -= part.size

        # Rows of the part that are contiguous in the array: they begin at the last axis that the
        # part has only some of. Part [2, 5, 8] of [4, 6, 8] -> axis 1 -> 2 rows of 40.
        partial_axes = [axis for axis, size in enumerate(part.shape) if size != self._shape[axis]]
        axis = partial_axes[-1] if partial_axes else 0
        rows = math.prod(part.shape[:axis])
        columns = part.size // max(rows, 1)
        bits = np.ascontiguousarray(part).reshape(rows, columns)
        bits = bits.view(_WORDS[part.dtype.itemsize])
        starts = self._row_starts(part.shape[:axis], start)

        # Blocks of the rows that stay in the cache.
        width = max(1, min(columns, _BLOCK))
        height = _BLOCK // width
        for row in range(0, rows, height):
            for column in range(0, columns, width):
                block = bits[row : row + height, column : column + width]
                block_starts = starts[row : row + height] + np.uint32(column % 2**32)
                self._add_block(block, block_starts)

    def text(self) -> str:
        """Returns what `digests` gives for the complete array."""
        assert self._left == 0, "every element comes once"
        return _text(np.array(self._sums, np.uint32))

    def _row_starts(
        self, leading: tuple[int, ...], start: tuple[int, ...]
    ) -> UInt32[np.ndarray, "rows"]:
        """Returns the index, modulo 2³², of the first element of each row of a part.

        Part [2, 5, 8] of [4, 6, 8] that starts at (1, 0, 0): leading (2,) -> [48, 96].
        """
        strides = [math.prod(self._shape[axis + 1 :]) for axis in range(len(self._shape))]
        first = sum(i * stride for i, stride in zip(start, strides, strict=True))
        index = np.full(leading, first % 2**32, np.uint32)
        for axis, size in enumerate(leading):
            stride = np.uint32(strides[axis] % 2**32)
            along_axis = np.arange(size, dtype=np.uint32) * stride
            # [size] -> [size, 1, …], which is added along the axis
            trailing = len(leading) - axis - 1
            index += along_axis.reshape(-1, *[1] * trailing)
        return index.reshape(-1)

    def _add_block(
        self, bits: Shaped[np.ndarray, "rows columns"], starts: UInt32[np.ndarray, "rows"]
    ) -> None:
        """Adds both sums of a block; `starts` are the indices of its first column."""
        # Two buffers for all steps: new arrays would cost more than the arithmetic.
        mixed = np.empty(bits.shape, np.uint32)
        shifted = np.empty(bits.shape, np.uint32)
        for i, mix in enumerate(_MIXES):
            # h(start + column) = h(start) + a column
            row_hashes = starts * np.uint32(mix.multiplier) + np.uint32(mix.offset)
            columns = _column_hashes(mix.multiplier, bits.shape[1])
            np.add(row_hashes[:, None], columns, out=mixed)
            np.bitwise_xor(mixed, bits, out=mixed)

            shifts = mix.bijection[::2]
            multipliers = (*mix.bijection[1::2], None)
            for shift, multiplier in zip(shifts, multipliers, strict=True):
                np.right_shift(mixed, np.uint32(shift), out=shifted)
                np.bitwise_xor(mixed, shifted, out=mixed)
                if multiplier is not None:
                    np.multiply(mixed, np.uint32(multiplier), out=mixed)

            total = int(mixed.sum(dtype=np.uint32))
            self._sums[i] = (self._sums[i] + total) % 2**32


# Unsigned words by their bytes, as which the bits of elements are taken.
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def digest_sums(x: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    """Returns both sums of one array; pure, for use under `jit`."""
    bits = _bits(x)
    index = _index(x.shape)
    mixed = [_mixed(bits, index, mix) for mix in _MIXES]

    def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
        return a[0] + b[0], a[1] + b[1]

    # One reduction of both: XLA for CPU vectorizes it, and does not vectorize one of each.
    zero = jnp.uint32(0)
    sums = jax.lax.reduce(tuple(mixed), (zero, zero), add, tuple(range(x.ndim)))
    return jnp.stack(sums)


_one_device = jax.jit(digest_sums)


def _digest_on_devices(x: Array) -> UInt32[Array, "2"]:
    if not isinstance(x.sharding, NamedSharding):
        return _one_device(x)
    # Replicated, so that every process can read the result.
    replicated = NamedSharding(x.sharding.mesh, PartitionSpec())
    return jax.jit(digest_sums, out_shardings=replicated)(x)


def _bits(x: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """Returns the bits of each element, as the low bits of a word."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    assert x.dtype.itemsize in _WORDS, f"no digest for {x.dtype}"
    bits = jax.lax.bitcast_convert_type(x, _WORDS[x.dtype.itemsize])
    return bits.astype(jnp.uint32)


def _index(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Returns the row-major index of each element modulo 2³²."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        along_axis = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += along_axis * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _mixed(
    bits: UInt32[Array, "..."], index: UInt32[Array, "..."], mix: _Mix
) -> UInt32[Array, "..."]:
    """Returns m(bits ⊕ h(index))."""
    x = bits ^ (index * jnp.uint32(mix.multiplier) + jnp.uint32(mix.offset))
    first_shift, first_multiplier, second_shift, second_multiplier, third_shift = mix.bijection
    x = (x ^ (x >> first_shift)) * jnp.uint32(first_multiplier)
    x = (x ^ (x >> second_shift)) * jnp.uint32(second_multiplier)
    return x ^ (x >> third_shift)


@functools.lru_cache(8)
def _column_hashes(multiplier: int, width: int) -> UInt32[np.ndarray, "columns"]:
    """Returns h without its offset, modulo 2³², of 0 … width - 1; cached, as widths are few."""
    return np.arange(width, dtype=np.uint32) * np.uint32(multiplier)


def _text(sums: UInt32[np.ndarray, "2"]) -> str:
    return "".join(f"{int(word):08x}" for word in sums)

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
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped, UInt32

_Words = UInt32[np.ndarray, "..."] | UInt32[Array, "..."]

# Elements that a running digest takes at a time: by its program, and by NumPy, within the cache.
_BLOCK = 2**18
_NUMPY_BLOCK = 2**15


class _Mix(NamedTuple):
    """The functions of one sum.

    Attributes:
      multiplier, offset: a (odd) and b of h(i) = a i + b.
      rounds: (shift s, multiplier c) of the bijection m: each does x = (x ⊕ (x >> s)) c.
      last_shift: s of what m ends with: x ⊕ (x >> s).
    """

    multiplier: int
    offset: int
    rounds: tuple[tuple[int, int], tuple[int, int]]
    last_shift: int


_MIXES = (
    _Mix(0x9E3779B1, 0x7F4A7C15, ((16, 0x85EBCA6B), (13, 0xC2B2AE35)), 16),
    _Mix(0xB5297A4D, 0x68E31DA4, ((16, 0x7FEB352D), (15, 0x846CA68B)), 16),
)
# Unsigned integer types by size in bytes: the bits of an element are taken as one of them.
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def digests(named: Mapping[str, Array]) -> dict[str, str]:
    """Returns 16 hexadecimal digits for each array.

    All processes that hold a part of an array must call this.
    """
    texts = {}
    for name, array in named.items():
        # Each is waited for, on all devices, before the next starts: with more than 32 programs
        # under way, the CPU devices of one process can stand still for ever. A thread that may not
        # start one yet then holds the place of one whose part of a collective is waited for.
        sums = jax.block_until_ready(_digest_on_devices(array))
        texts[name] = _text(np.asarray(sums))
    return texts


class RunningDigest:
    """The digest of an array that comes in parts, each element once and in any order.

    Args:
      shape: of the array.
      compiled: whether JAX's CPU device, where there is one, adds up instead of NumPy. It takes
        half the time, and starts JAX's devices.
    """

    def __init__(self, shape: tuple[int, ...], *, compiled: bool = False):
        self._shape = shape
        self._device = _cpu_device() if compiled else None
        self._block = _NUMPY_BLOCK if self._device is None else _BLOCK
        self._sums = np.zeros(2, np.uint32)
        self._missing = math.prod(shape)

    def add(self, part: Shaped[np.ndarray, "..."], start: tuple[int, ...]) -> None:
        """Adds the part whose first element has the indices `start` in the array."""
        self._missing -= part.size

        # Rows of the part that are contiguous in the array: part [2, 5, 8] of [4, 6, 8]
        # -> leading axes [2] -> 2 rows of 40.
        leading = self._leading_axes(part.shape)
        rows = math.prod(leading)
        columns = part.size // max(rows, 1)
        table = np.ascontiguousarray(part).reshape(rows, columns)

        word = _WORDS[part.dtype.itemsize]
        bits = table.view(word)
        starts = self._row_starts(leading, start)

        # Blocks of the rows: 2 rows of 40, of 16 elements
        # -> blocks of 1 row and 16, 16 and 8 columns.
        width = max(1, min(columns, self._block))
        height = self._block // width
        for row in range(0, rows, height):
            block_rows = slice(row, row + height)
            for column in range(0, columns, width):
                block_columns = slice(column, column + width)
                offset = np.uint32(column % 2**32)
                block_starts = starts[block_rows] + offset
                self._add_block(bits[block_rows, block_columns], block_starts)

    def text(self) -> str:
        """Returns what `digests` gives for the complete array."""
        assert self._missing == 0, "every element comes once"
        return _text(self._sums)

    def _leading_axes(self, part_shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the sizes of the axes before the last one that a part has only some of."""
        last = 0
        for axis, size in enumerate(part_shape):
            if size != self._shape[axis]:
                last = axis
        return part_shape[:last]

    def _row_starts(
        self, leading: tuple[int, ...], start: tuple[int, ...]
    ) -> UInt32[np.ndarray, "rows"]:
        """Returns the index, modulo 2³², of the first element of each row of a part.

        Part [2, 5, 8] of [4, 6, 8] that starts at (1, 0, 0): leading (2,) -> [48, 96].
        """
        strides = _strides(self._shape)
        first = 0
        for index, stride in zip(start, strides, strict=True):
            first += index * stride

        # Axis by axis: starts [48] and 2 rows along an axis of stride 8 -> [48, 56]
        starts = np.array([first], np.int64)
        for axis, size in enumerate(leading):
            stride = strides[axis]
            along_axis = stride * np.arange(size, dtype=np.int64)
            starts = np.add.outer(starts, along_axis).reshape(-1)

        # Modulo 2³²: the cast keeps the low bits.
        return starts.astype(np.uint32)

    def _add_block(
        self, bits: Shaped[np.ndarray, "rows columns"], starts: UInt32[np.ndarray, "rows"]
    ) -> None:
        """Adds both sums of a block; `starts` are the indices of its first column."""
        words = bits.reshape(-1)
        first = starts[0]
        offsets = ((starts - first).tobytes(), bits.shape[1])
        if self._device is None:
            sums = _numpy_sums(words, offsets, first)
        else:
            sums = _compiled_sums(words, offsets, first, self._device)
        # Modulo 2³²
        self._sums += sums


def _cpu_device() -> jax.Device | None:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        # JAX was told to start accelerators only.
        return None


@functools.lru_cache(8)
def _offsets(starts: bytes, columns: int) -> UInt32[np.ndarray, "words"]:
    """Returns the index of each word of a block relative to the first: starts [0, 48], 4 columns
    -> [0, 1, 2, 3, 48, 49, 50, 51]; cached, as few blocks differ.

    Args:
      starts: the bytes of those of the rows.
      columns: of the block.
    """
    of_rows = np.frombuffer(starts, np.uint32)
    along_row = np.arange(columns, dtype=np.uint32)
    return np.add.outer(of_rows, along_row).reshape(-1)


@functools.lru_cache(8)
def _offset_hashes(starts: bytes, columns: int, multiplier: int) -> UInt32[np.ndarray, "words"]:
    """Returns h without its offset of what `_offsets` returns."""
    return _offsets(starts, columns) * np.uint32(multiplier)


@functools.lru_cache(8)
def _offsets_on_device(starts: bytes, columns: int, device: jax.Device) -> UInt32[Array, "words"]:
    padded = np.zeros(_BLOCK, np.uint32)
    offsets = _offsets(starts, columns)
    padded[: offsets.size] = offsets
    return jax.device_put(padded, device)


def _numpy_sums(
    words: Shaped[np.ndarray, "words"], offsets: tuple[bytes, int], first: np.uint32
) -> UInt32[np.ndarray, "2"]:
    """Returns both sums of a block; `offsets` are the arguments of `_offsets`."""
    words = words.astype(np.uint32, copy=False)
    sums = np.zeros(2, np.uint32)
    for i, mix in enumerate(_MIXES):
        # h(first + offset) = h(first) + a offset
        with np.errstate(over="ignore"):
            first_hash = _hash(first, mix)
        index_hash = first_hash + _offset_hashes(*offsets, mix.multiplier)
        sums[i] = _mixed(words, index_hash, mix).sum(dtype=np.uint32)
    return sums


def _compiled_sums(
    words: Shaped[np.ndarray, "words"],
    offsets: tuple[bytes, int],
    first: np.uint32,
    device: jax.Device,
) -> UInt32[np.ndarray, "2"]:
    """As `_numpy_sums`, by a program."""
    count = np.uint32(words.size)
    # All blocks are padded to one shape: it is compiled once.
    if words.size < _BLOCK or words.dtype != np.uint32:
        padded = np.zeros(_BLOCK, np.uint32)
        padded[: words.size] = words
        words = padded
    words = jax.device_put(words, device)
    sums = _block_sums(words, _offsets_on_device(*offsets, device), first, count)
    return np.asarray(sums)


@jax.jit
def _block_sums(
    words: UInt32[Array, "words"],
    offsets: UInt32[Array, "words"],
    first: UInt32[Array, ""],
    count: UInt32[Array, ""],
) -> UInt32[Array, "2"]:
    """Returns both sums of the first `count` words of a block."""
    is_word = jax.lax.iota(jnp.uint32, _BLOCK) < count
    index = first + offsets
    mixed = []
    for mix in _MIXES:
        of_words = _mixed(words, _hash(index, mix), mix)
        mixed.append(jnp.where(is_word, of_words, 0))
    return _add_all(mixed)


def digest_sums(x: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    """Returns both sums of one array; pure, for use under `jit`."""
    bits = _bits(x)
    index = _index(x.shape)
    return _add_all([_mixed(bits, _hash(index, mix), mix) for mix in _MIXES])


def _add_all(mixed: Sequence[UInt32[Array, "..."]]) -> UInt32[Array, "2"]:
    """Returns the sum of each of two arrays modulo 2³²."""
    # One reduction of both: XLA for CPU vectorizes it, and does not vectorize one of each.
    zero = jnp.uint32(0)
    all_axes = tuple(range(mixed[0].ndim))
    sums = jax.lax.reduce(tuple(mixed), (zero, zero), _add_pairs, all_axes)
    return jnp.stack(sums)


def _add_pairs(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    first = a[0] + b[0]
    second = a[1] + b[1]
    return first, second


_one_device = jax.jit(digest_sums)


def _digest_on_devices(x: Array) -> UInt32[Array, "2"]:
    if not isinstance(x.sharding, NamedSharding):
        return _one_device(x)
    # Replicated, so that every process can read the result.
    replicated = NamedSharding(x.sharding.mesh, PartitionSpec())
    digest = jax.jit(digest_sums, out_shardings=replicated)
    return digest(x)


def _bits(x: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    """Returns the bits of each element, as the low bits of a word."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    itemsize = x.dtype.itemsize
    assert itemsize in _WORDS, f"no digest for {x.dtype}"
    # bfloat16 1.0 -> uint16 0x3F80 -> uint32 0x00003F80
    bits = jax.lax.bitcast_convert_type(x, _WORDS[itemsize])
    return bits.astype(jnp.uint32)


def _strides(shape: tuple[int, ...]) -> list[int]:
    """Returns the elements from one index of each axis to the next: [4, 6, 8] -> [48, 8, 1]."""
    strides = []
    stride = 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= size
    return strides[::-1]


def _index(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Returns the row-major index of each element modulo 2³²."""
    index = jnp.zeros(shape, jnp.uint32)
    strides = _strides(shape)
    for axis in reversed(range(len(shape))):
        along_axis = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        stride = jnp.uint32(strides[axis] % 2**32)
        index += along_axis * stride
    return index


def _mixed(bits: _Words, index_hash: _Words, mix: _Mix) -> _Words:
    """Returns m(bits ⊕ h(index)), of NumPy's arrays or JAX's."""
    x = bits ^ index_hash
    for shift, multiplier in mix.rounds:
        x ^= x >> shift
        x *= np.uint32(multiplier)
    x ^= x >> mix.last_shift
    return x


def _hash(index: _Words | np.uint32, mix: _Mix) -> _Words | np.uint32:
    """Returns h(index), of NumPy's arrays or JAX's."""
    return index * np.uint32(mix.multiplier) + np.uint32(mix.offset)


def _text(sums: UInt32[np.ndarray, "2"]) -> str:
    first, second = sums.tolist()
    return f"{first:08x}{second:08x}"

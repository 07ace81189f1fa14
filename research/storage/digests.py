"""Digests of arrays that do not depend on how the arrays are sharded.

    digest(x) = ( Σ_i m₁(x_i ⊕ h₁(i)) mod 2³²,  Σ_i m₂(x_i ⊕ h₂(i)) mod 2³² )

`x_i` are the bits of element `i` (its index in the whole array), `h` spreads the index, and `m₁`,
`m₂` are bijections of 32-bit words. Both sums are blind to order, so every device adds up its own
part and nothing is gathered. A change of one element, a flipped bit for instance, changes both sums
for certain, because `m` is a bijection; any other damage goes unseen with probability 2⁻⁶⁴.

Source of the bijections: the finalizer of MurmurHash3 (Appleby 2011) and "lowbias32" of Wellons
2018, "Prospecting for hash functions".
"""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped, UInt32

# Elements that a running digest takes at a time: few enough to stay in the cache between its steps.
_BLOCK = 2**16
# Per sum: (odd multiplier and offset of the index, shifts and multipliers of the bijection).
_MIXES = (
    (0x9E3779B1, 0x7F4A7C15, (16, 0x85EBCA6B, 13, 0xC2B2AE35, 16)),
    (0xB5297A4D, 0x68E31DA4, (16, 0x7FEB352D, 15, 0x846CA68B, 16)),
)


def digests(named: Mapping[str, Array]) -> dict[str, str]:
    """Returns 16 hexadecimal digits for each array; all processes that hold a part of it must call
    this.
    """
    sums = {name: _digest_on_its_devices(leaf) for name, leaf in named.items()}
    return {name: _text(np.asarray(pair)) for name, pair in sums.items()}


class RunningDigest:
    """The digest of an array that comes in parts, each element once and in any order.

    It is taken with NumPy: parts have many shapes, and are on the host.
    """

    def __init__(self, shape: tuple[int, ...]):
        self._shape, self._sums, self._left = shape, [0, 0], math.prod(shape)

    def add(self, part: Shaped[np.ndarray, "..."], start: tuple[int, ...]) -> None:
        """Adds the part whose first element has the indices `start` in the array."""
        self._left -= part.size
        # The part as rows that lie without gaps in the array: its last cut axis, and those after
        # it.
        cut = [axis for axis, size in enumerate(part.shape) if size != self._shape[axis]]
        lead = cut[-1] if cut else 0
        rows = math.prod(part.shape[:lead])
        bits = np.ascontiguousarray(part).reshape(rows, part.size // max(rows, 1))
        bits = bits.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[part.dtype.itemsize])
        starts = self._indices(part.shape[:lead], start)
        width = max(1, min(bits.shape[1], _BLOCK))
        height = _BLOCK // width
        for row in range(0, rows, height):
            for column in range(0, bits.shape[1], width):
                block = bits[row : row + height, column : column + width]
                self._add(block, starts[row : row + height] + np.uint32(column % 2**32))

    def text(self) -> str:
        """Returns what `digests` gives for the whole array."""
        assert self._left == 0, "every element comes once"
        return _text(np.array(self._sums, np.uint32))

    def _indices(self, lead: tuple[int, ...], start: tuple[int, ...]) -> UInt32[np.ndarray, "rows"]:
        """The index of the first element of each row of a part."""
        strides = [math.prod(self._shape[axis + 1 :]) for axis in range(len(self._shape))]
        first = sum(a * b for a, b in zip(start, strides, strict=True))
        index = np.full(lead, first % 2**32, np.uint32)
        for axis, size in enumerate(lead):
            along = np.arange(size, dtype=np.uint32) * np.uint32(strides[axis] % 2**32)
            index += along.reshape(-1, *[1] * (len(lead) - axis - 1))
        return index.reshape(-1)

    def _add(
        self, bits: Shaped[np.ndarray, "rows columns"], starts: UInt32[np.ndarray, "rows"]
    ) -> None:
        mixed, shifted = np.empty(bits.shape, np.uint32), np.empty(bits.shape, np.uint32)
        for i, (spread, offset, steps) in enumerate(_MIXES):
            first = starts * np.uint32(spread) + np.uint32(offset)
            np.add(first[:, None], _ramp(spread, bits.shape[1]), out=mixed)
            np.bitwise_xor(mixed, bits, out=mixed)
            for shift, multiplier in zip(steps[::2], (*steps[1::2], None), strict=True):
                np.right_shift(mixed, np.uint32(shift), out=shifted)
                np.bitwise_xor(mixed, shifted, out=mixed)
                if multiplier is not None:
                    np.multiply(mixed, np.uint32(multiplier), out=mixed)
            self._sums[i] = (self._sums[i] + int(mixed.sum(dtype=np.uint32))) % 2**32


def digest_sums(x: Shaped[Array, "..."]) -> UInt32[Array, "2"]:
    """Returns both sums of one array; pure, for use under `jit`."""
    bits, index = _bits(x), _index(x.shape)
    mixed = [
        _mix(bits ^ (index * jnp.uint32(spread) + jnp.uint32(offset)), m)
        for spread, offset, m in _MIXES
    ]
    zero = jnp.uint32(0)
    # One reduction of both: XLA for CPU vectorizes it, and does not vectorize one of each.
    return jnp.stack(
        jax.lax.reduce(
            tuple(mixed),
            (zero, zero),
            lambda a, b: (a[0] + b[0], a[1] + b[1]),
            tuple(range(x.ndim)),
        )
    )


_one_device = jax.jit(digest_sums)


def _digest_on_its_devices(x: Array) -> UInt32[Array, "2"]:
    if not isinstance(x.sharding, NamedSharding):
        return _one_device(x)
    # Replicated, so that every process can read the result.
    return jax.jit(digest_sums, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)


def _bits(x: Shaped[Array, "..."]) -> UInt32[Array, "..."]:
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    words = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}
    assert x.dtype.itemsize in words, f"no digest for {x.dtype}"
    return jax.lax.bitcast_convert_type(x, words[x.dtype.itemsize]).astype(jnp.uint32)


def _index(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """The row-major index of each element modulo 2³²."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _mix(x: UInt32[Array, "..."], steps: tuple[int, int, int, int, int]) -> UInt32[Array, "..."]:
    first, multiplier, second, other, third = steps
    x = (x ^ (x >> first)) * jnp.uint32(multiplier)
    x = (x ^ (x >> second)) * jnp.uint32(other)
    return x ^ (x >> third)


@functools.lru_cache(8)
def _ramp(spread: int, width: int) -> UInt32[np.ndarray, "columns"]:
    return np.arange(width, dtype=np.uint32) * np.uint32(spread)


def _text(sums: UInt32[np.ndarray, "2"]) -> str:
    return "".join(f"{int(word):08x}" for word in sums)

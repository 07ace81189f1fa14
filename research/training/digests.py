"""Digests of arrays that do not depend on how the arrays are sharded.

    digest(x) = ( Σ_i m₁(x_i ⊕ h₁(i)) mod 2³²,  Σ_i m₂(x_i ⊕ h₂(i)) mod 2³² )

`x_i` are the bits of element `i` (its index in the whole array), `h` spreads the index, and `m₁`, `m₂` are bijections
of 32-bit words. Both sums are blind to order, so every device adds up its own part and nothing is gathered. A change
of one element, a flipped bit for instance, changes both sums for certain, because `m` is a bijection; any other damage
goes unseen with probability 2⁻⁶⁴.

Source of the bijections: the finalizer of MurmurHash3 (Appleby 2011) and "lowbias32" of Wellons 2018, "Prospecting for
hash functions".
"""

import functools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Shaped, UInt32

# Bytes of which a running digest makes one call.
_SLAB_BYTES = 2**22
# Per sum: (odd multiplier and offset of the index, shifts and multipliers of the bijection).
_MIXES = (
    (0x9E3779B1, 0x7F4A7C15, (16, 0x85EBCA6B, 13, 0xC2B2AE35, 16)),
    (0xB5297A4D, 0x68E31DA4, (16, 0x7FEB352D, 15, 0x846CA68B, 16)),
)


def digests(named: Mapping[str, Array]) -> dict[str, str]:
    """Returns 16 hexadecimal digits for each array; all processes that hold a part of it must call this."""
    sums = {name: _digest_on_its_devices(leaf) for name, leaf in named.items()}
    return {name: _text(np.asarray(pair)) for name, pair in sums.items()}


class RunningDigest:
    """The digest of an array that comes in parts, each once and in any order."""

    def __init__(self, shape: tuple[int, ...]):
        self._shape, self._sums, self._left = shape, np.zeros(2, np.uint32), math.prod(shape)

    def add(self, part: Shaped[np.ndarray, "..."], start: tuple[int, ...]) -> None:
        """Adds the part whose first element lies at the indices `start` of the array."""
        self._left -= part.size
        for slab, offset in _slabs(part):
            place = np.array([a + b for a, b in zip(start, offset, strict=True)], np.uint32)
            self._sums += np.asarray(_one_part(slab, place, self._shape))

    def text(self) -> str:
        """Returns what `digests` gives for the whole array."""
        assert self._left == 0, "every element comes once"
        return _text(self._sums)


def digest_sums(
    x: Shaped[Array, "..."], start: UInt32[Array, "axes"] | None = None, whole: tuple[int, ...] | None = None
) -> UInt32[Array, "2"]:
    """Returns both sums of one array, or of one part of it; pure, for use under `jit`.

    Args:
      x: the array or the part.
      start: the indices of the part's first element in the array; None for 0.
      whole: the array's shape; None for that of `x`.
    """
    bits, index = _bits(x), _index(x.shape, start, x.shape if whole is None else whole)
    mixed = [_mix(bits ^ (index * jnp.uint32(spread) + jnp.uint32(offset)), m) for spread, offset, m in _MIXES]
    zero = jnp.uint32(0)
    # One reduction of both: XLA for CPU vectorizes it, and does not vectorize one of each.
    return jnp.stack(
        jax.lax.reduce(tuple(mixed), (zero, zero), lambda a, b: (a[0] + b[0], a[1] + b[1]), tuple(range(x.ndim)))
    )


_one_device = jax.jit(digest_sums)
_one_part = functools.partial(jax.jit, static_argnums=2)(digest_sums)


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


def _index(shape: tuple[int, ...], start: UInt32[Array, "axes"] | None, whole: tuple[int, ...]) -> UInt32[Array, "..."]:
    """The row-major index in the whole array, modulo 2³², of each element of a part."""
    index, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index += (along if start is None else along + start[axis]) * jnp.uint32(stride % 2**32)
        stride *= whole[axis]
    return index


def _slabs(part: Shaped[np.ndarray, "..."]) -> Iterator[tuple[Shaped[np.ndarray, "..."], tuple[int, ...]]]:
    """Yields a part cut across its first long axis, and where each piece starts in it: JAX copies what it is given."""
    axis = next((axis for axis, size in enumerate(part.shape) if size > 1), None)
    if axis is None or part.nbytes <= _SLAB_BYTES:
        yield part, (0,) * part.ndim
        return
    rows = max(1, _SLAB_BYTES * part.shape[axis] // part.nbytes)
    before = (slice(None),) * axis
    for first in range(0, part.shape[axis], rows):
        slab = part[(*before, slice(first, first + rows))]
        for piece, offset in _slabs(slab) if rows == 1 else [(slab, (0,) * part.ndim)]:
            yield piece, (*offset[:axis], first, *offset[axis + 1 :])


def _text(sums: UInt32[np.ndarray, "2"]) -> str:
    return "".join(f"{int(word):08x}" for word in sums)


def _mix(x: UInt32[Array, "..."], steps: tuple[int, int, int, int, int]) -> UInt32[Array, "..."]:
    first, multiplier, second, other, third = steps
    x = (x ^ (x >> first)) * jnp.uint32(multiplier)
    x = (x ^ (x >> second)) * jnp.uint32(other)
    return x ^ (x >> third)

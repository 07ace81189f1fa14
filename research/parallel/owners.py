"""Matrices of which every device has a slice, as whole matrices of single devices, and back; for
code inside a `shard_map`.

Of n matrices over s devices each device owns n / s. One all-to-all brings the slices together, and
one takes them apart: each device sends (s - 1) / s of the bytes of its slices each way.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Slices:
    """How each of some matrices is sliced.

    Attributes:
      mesh_axes: for each axis of a matrix, the mesh axes over which it is sharded.
      shards: for each axis of a matrix, into how many slices it is cut.
    """

    mesh_axes: tuple[tuple[str, ...], ...]
    shards: tuple[int, ...]

    @property
    def joined(self) -> tuple[str, ...]:
        """All mesh axes, in the order in which they shard a matrix."""
        return tuple(name for names in self.mesh_axes for name in names)

    @property
    def devices(self) -> int:
        """How many devices have a slice of each matrix."""
        return math.prod(self.shards)

    def to_owners(self, slices: Float[Array, "n ..."]) -> Float[Array, "owned ..."]:
        """Returns the whole matrices that this device owns; the last devices own zeros where the
        devices do not divide n.

        A single matrix is gathered by all devices, which is half as many bytes as a way to one
        owner and back.

        Args:
          slices: this device's slices of all n matrices.
        """
        count, *slice_shape = slices.shape
        if count == 1:
            parts = jax.lax.all_gather(slices, self.joined)
            return self._join(parts)

        # 6 matrices, 4 devices: [8, d, f] -> [4, 2, d, f], of which row i goes to device i
        owned = -(-count // self.devices)
        padding = owned * self.devices - count
        no_padding = [(0, 0)] * len(slice_shape)
        padded = jnp.pad(slices, [(0, padding), *no_padding])
        by_owner = padded.reshape(self.devices, owned, *slice_shape)
        parts = jax.lax.all_to_all(by_owner, self.joined, 0, 0)
        return self._join(parts)

    def to_slices(self, matrices: Float[Array, "owned ..."], count: int) -> Float[Array, "n ..."]:
        """Returns this device's slices of all matrices.

        Args:
          matrices: that this device owns, in the order of `to_owners`.
          count: of the matrices of all devices, n.
        """
        by_device = self._split(matrices)
        if count == 1:
            index = jax.lax.axis_index(self.joined)
            return jax.lax.dynamic_index_in_dim(by_device, index, keepdims=False)

        # [4, 2, d, f] -> [8, d, f] -> 6 matrices
        by_owner = jax.lax.all_to_all(by_device, self.joined, 0, 0)
        _, _, *slice_shape = by_owner.shape
        slices = by_owner.reshape(-1, *slice_shape)
        return slices[:count]

    def _join(self, parts: Float[Array, "devices owned ..."]) -> Float[Array, "owned ..."]:
        """Returns whole matrices from the slices of all devices."""
        _, owned, *slice_shape = parts.shape
        rank = len(self.shards)

        # 4 × 2 devices: [8, n, d, f] -> [4, 2, n, d, f] -> [n, 4, d, 2, f] -> [n, 4 d, 2 f]
        grid = parts.reshape(*self.shards, owned, *slice_shape)
        order = [rank]
        whole = []
        for axis in range(rank):
            of_slice = rank + 1 + axis
            order.append(axis)
            order.append(of_slice)
            size = self.shards[axis] * slice_shape[axis]
            whole.append(size)
        ordered = grid.transpose(order)
        return ordered.reshape(owned, *whole)

    def _split(self, matrices: Float[Array, "owned ..."]) -> Float[Array, "devices owned ..."]:
        """Returns the slices of all devices: the inverse of `_join`."""
        owned, *whole = matrices.shape

        # [n, 4 d, 2 f] -> [n, 4, d, 2, f] -> [4, 2, n, d, f] -> [8, n, d, f]
        cut = []
        device_axes = []
        slice_axes = []
        slice_shape = []
        for shards, size in zip(self.shards, whole, strict=True):
            device_axes.append(len(cut) + 1)
            slice_axes.append(len(cut) + 2)
            slice_shape.append(size // shards)
            cut.append(shards)
            cut.append(size // shards)
        grid = matrices.reshape(owned, *cut)
        ordered = grid.transpose(*device_axes, 0, *slice_axes)
        return ordered.reshape(self.devices, owned, *slice_shape)

"""Exchanges between the devices along one mesh axis, for code inside a `shard_map`.

The devices are in groups of consecutive ones, `group_size`; those at the same place of their groups
form a ring: of 8 devices in groups of 2, devices 1, 3, 5 and 7 are one.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


@dataclasses.dataclass(frozen=True)
class Ring:
    """The rings of devices along a mesh axis.

    Attributes:
      axis: the mesh axis.
      size: devices of a ring.
      group_size: devices of a group, as many as there are rings.
    """

    axis: str
    size: int
    group_size: int = 1

    def index(self) -> Int[Array, ""]:
        """Returns the place of this device in its ring."""
        return jax.lax.axis_index(self.axis) // self.group_size

    def rotate(self, tree: Any) -> Any:
        """Returns what the device before this one has; the first gets it from the last."""
        targets = [(place + 1) % self.size for place in range(self.size)]
        return self.send(tree, targets)

    def send(self, tree: Any, targets: list[int]) -> Any:
        """Returns what another device of the ring sends here.

        Args:
          tree: arrays of this device.
          targets: for each place of the ring, the place that its device sends to; a permutation.
        """
        if targets == list(range(self.size)):
            # Each device keeps what it has: XLA would copy it.
            return tree
        # Groups of 2: member 1 of place 3 is device 7.
        pairs = []
        for source, target in enumerate(targets):
            first_source = source * self.group_size
            first_target = target * self.group_size
            for member in range(self.group_size):
                pair = (first_source + member, first_target + member)
                pairs.append(pair)

        def exchange(x: Array) -> Array:
            return jax.lax.ppermute(x, self.axis, pairs)

        return jax.tree.map(exchange, tree)

    def groups(self) -> list[list[int]]:
        """Returns the devices of each group."""
        groups = []
        for place in range(self.size):
            # Groups of 2: place 3 is devices 6 and 7.
            start = place * self.group_size
            stop = start + self.group_size
            groups.append(list(range(start, stop)))
        return groups


def to_zigzag(ring: Ring, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    """Returns the halves i and 2n − 1 − i of an array whose consecutive halves 2i and 2i + 1 are on
    device i of n.

    Under a causal mask each device then has as many visible pairs of a query and a key as any
    other. With 2 devices: [0 1] [2 3] -> [0 3] [1 2]

    Args:
      ring: the devices.
      x: this device's part.
      axis: that is cut; the ring's devices hold consecutive parts of it.
    """
    first, second = jnp.split(x, 2, axis=axis)
    from_even = ring.send(first, _targets(ring.size, 0))
    from_odd = ring.send(second, _targets(ring.size, 1))
    # Device i gets half i, which is even where i is.
    is_even = ring.index() % 2 == 0
    low = jnp.where(is_even, from_even, from_odd)
    high = jnp.where(is_even, from_odd, from_even)
    return jnp.concatenate([low, high], axis=axis)


def from_zigzag(ring: Ring, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    """Returns the inverse of `to_zigzag`."""
    low, high = jnp.split(x, 2, axis=axis)
    is_even = ring.index() % 2 == 0
    even = jnp.where(is_even, low, high)
    odd = jnp.where(is_even, high, low)

    # Back to where each half came from.
    even_sources = _inverse(_targets(ring.size, 0))
    odd_sources = _inverse(_targets(ring.size, 1))
    first = ring.send(even, even_sources)
    second = ring.send(odd, odd_sources)
    return jnp.concatenate([first, second], axis=axis)


def _targets(size: int, parity: int) -> list[int]:
    """Returns where device i sends half 2i + parity; half h goes to device min(h, 2n − 1 − h)."""
    halves = [2 * place + parity for place in range(size)]
    return [min(half, 2 * size - 1 - half) for half in halves]


def _inverse(targets: list[int]) -> list[int]:
    # [0, 2, 1] sends 1 to 2; its inverse sends 2 to 1.
    return [targets.index(place) for place in range(len(targets))]

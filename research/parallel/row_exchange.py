"""Rows that go from each device to the devices that want them, as many as each pair needs.

This is the dispatch of experts: rows are token states, and a device wants those that chose one of
its experts. It runs inside a `shard_map`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.parallel.target import platform


class Route(NamedTuple):
    """Which rows go where, for every pair of devices along an axis; all devices know all of it.

    Attributes:
      counts: rows from a source to a target.
      source_offsets: the first of them in the array of the source, whose rows for one target follow
          each other.
      target_offsets: the place of the first of them in the array of the target.
    """

    counts: Int[Array, "sources targets"]
    source_offsets: Int[Array, "sources targets"]
    target_offsets: Int[Array, "sources targets"]

    def reversed(self) -> "Route":
        """Returns the way back."""
        return Route(self.counts.T, self.target_offsets.T, self.source_offsets.T)


def plan_route(wanted: Int[Array, "sources targets"], capacity: int) -> Route:
    """Returns the route of rows that lie in the order of their targets, and arrive in the order of
    their sources.

    Args:
      wanted: rows from each source to each target.
      capacity: the most rows that a target takes; those of the last sources stay where they are.
    """
    # Sources send [2, 1] and [3, 4] rows: source offsets [0, 2] and [0, 3].
    source_offsets = jnp.cumsum(wanted, axis=1) - wanted
    arriving = jnp.cumsum(wanted, axis=0) - wanted
    # With a capacity of 4 rows, target 1 takes 1 of source 0 and 3 of the 4 of source 1.
    counts = jnp.clip(capacity - arriving, 0, wanted)
    target_offsets = jnp.cumsum(counts, axis=0) - counts
    return Route(counts, source_offsets, target_offsets)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def send_rows(
    rows: Float[Array, "rows D"], route: Route, axis: str, size: int
) -> Float[Array, "size D"]:
    """Returns the rows that arrive at this device, and zeros where none does.

    Args:
      rows: of this device.
      route: of all devices along the axis.
      axis: the mesh axis.
      size: rows of the result.
    """
    if platform() == "cpu":
        return _send_padded(rows, route, axis, size)
    here = jax.lax.axis_index(axis)
    zeros = jnp.zeros((size, rows.shape[1]), rows.dtype)
    return jax.lax.ragged_all_to_all(
        rows,
        zeros,
        input_offsets=route.source_offsets[here],
        send_sizes=route.counts[here],
        output_offsets=route.target_offsets[here],
        recv_sizes=route.counts[:, here],
        axis_name=axis,
    )


def _forward(rows: Array, route: Route, axis: str, size: int) -> tuple[Array, tuple[Route, int]]:
    return send_rows(rows, route, axis, size), (route, rows.shape[0])


def _backward(
    axis: str, size: int, residuals: tuple[Route, int], g: Float[Array, "size D"]
) -> tuple[Array, None]:
    # The gradient of a row that went somewhere comes back from there.
    route, num_rows = residuals
    return send_rows(g, route.reversed(), axis, num_rows), None


send_rows.defvjp(_forward, _backward)


def _send_padded(
    rows: Float[Array, "rows D"], route: Route, axis: str, size: int
) -> Float[Array, "size D"]:
    """Does the same with as many places for each pair of devices as it may ever need: XLA for CPU
    has no ragged exchange.
    """
    here = jax.lax.axis_index(axis)
    most = min(rows.shape[0], size)
    place = jnp.arange(most)[None]

    # [targets, most, D]: the rows for each target, from its offset on
    sent = place < route.counts[here][:, None]
    offsets = route.source_offsets[here][:, None]
    source = jnp.where(sent, offsets + place, 0)
    packed = jnp.where(sent[..., None], rows[source], 0)
    arrived = jax.lax.all_to_all(packed, axis, split_axis=0, concat_axis=0, tiled=True)

    # [sources, most, D] -> [size, D]; places without a row go to one past the end.
    filled = place < route.counts[:, here][:, None]
    offsets = route.target_offsets[:, here][:, None]
    target = jnp.where(filled, offsets + place, size)
    target = target.reshape(-1)
    width = rows.shape[1]
    arrived = arrived.reshape(-1, width)
    out = jnp.zeros((size + 1, width), rows.dtype)
    out = out.at[target].set(arrived)
    return out[:size]

"""Brings tokens to the experts that they chose, and outputs back, inside a `shard_map`.

Each device has some tokens and some experts. Three cases:

- One device has all experts: the choices are sorted by expert.
- Experts are sharded along a mesh axis, and so are tokens: the choices go to the devices of their
  experts, which sort what arrives, and the outputs come back (`row_exchange`).
- Experts are sharded, and every device along the axis has the same tokens (few rows, in decoding):
  each computes its own experts' outputs, and 0 for the others; the caller adds them up.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.parallel.row_exchange import Route, plan_route, send_rows

# (rows sorted by expert, rows of each expert, expert of each row) -> outputs
ApplyExperts = Callable[
    [Float[Array, "rows D"], Int[Array, "E"], Int[Array, "rows"]], Float[Array, "rows D"]
]


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """Where the experts are.

    Attributes:
      num_experts: E, of all devices.
      axis: the mesh axis along which they are sharded, or None.
      devices: along that axis.
      tokens_sharded: whether the devices along it have different tokens.
      buffer_factor: the most choices that a device takes, as a multiple of those of its own tokens:
          what it would get of an even load; the rest is dropped. None takes as many as may come.
    """

    num_experts: int
    axis: str | None = None
    devices: int = 1
    tokens_sharded: bool = False
    buffer_factor: float | None = None

    @property
    def local_experts(self) -> int:
        """How many experts a device has."""
        return self.num_experts // self.devices

    def buffer_rows(self, tokens: int, choices: int) -> int:
        """Returns the most choices that a device takes.

        Args:
          tokens: of each device.
          choices: of each token.
        """
        # A token chooses an expert once: at most as many of its choices as there are experts here.
        most_of_token = min(choices, self.local_experts)
        most = self.devices * tokens * most_of_token
        if self.buffer_factor is None:
            return most
        rows = math.ceil(self.buffer_factor * tokens * choices)
        return min(most, rows)


def run_experts(
    dispatch: Dispatch,
    apply: ApplyExperts,
    x: Float[Array, "tokens D"],
    chosen: Int[Array, "tokens choices"],
    weights: Float[Array, "tokens choices"],
) -> tuple[Float[Array, "tokens D"], Int[Array, ""]]:
    """Returns the weighted sum of the chosen experts' outputs, and how many choices of this
    device's tokens found no place in the buffer of another.

    Args:
      dispatch: where the experts are.
      apply: computes this device's experts.
      x: this device's tokens.
      chosen: their experts; E for a choice that is dropped.
      weights: of the choices.
    """
    tokens, choices = chosen.shape
    # Two tokens with two choices each: rows [x0, x0, x1, x1]
    rows = jnp.repeat(x, choices, axis=0)
    expert_of_row = chosen.reshape(-1)
    lost = jnp.zeros((), jnp.int32)
    if dispatch.axis is None:
        y = _apply_sorted(apply, rows, expert_of_row, dispatch.num_experts)
    elif not dispatch.tokens_sharded:
        y = _apply_own(dispatch, apply, rows, expert_of_row)
    else:
        capacity = dispatch.buffer_rows(tokens, choices)
        y, lost = _apply_exchanged(dispatch, apply, rows, expert_of_row, capacity)

    # [rows, D] -> [tokens, choices, D] -> [tokens, D]
    y = y.reshape(tokens, choices, -1)
    outputs = jnp.einsum("tcd,tc->td", y, weights)
    return outputs, lost


def _apply_sorted(
    apply: ApplyExperts,
    rows: Float[Array, "rows D"],
    expert_of_row: Int[Array, "rows"],
    num_experts: int,
) -> Float[Array, "rows D"]:
    """Returns each row's output; 0 where its expert is none of these."""
    # The experts [2, 0, 0, 1] of four rows -> order [1, 2, 3, 0], so that rows of expert 0 come
    # first; inverse [3, 0, 1, 2].
    order = jnp.argsort(expert_of_row, stable=True)
    inverse = jnp.argsort(order)
    # Rows of no expert come last, and are in no group.
    group_sizes = jnp.bincount(expert_of_row, length=num_experts).astype(jnp.int32)
    sorted_expert = jnp.minimum(expert_of_row[order], num_experts - 1)
    sorted_rows = _permute(rows, order, inverse)
    y = apply(sorted_rows, group_sizes, sorted_expert)
    y = _without_other_rows(y, group_sizes)
    return _permute(y, inverse, order)


def _without_other_rows(
    y: Float[Array, "rows D"], group_sizes: Int[Array, "E"]
) -> Float[Array, "rows D"]:
    """Returns 0 for the rows behind all groups, which a bias was added to."""
    index = jnp.arange(y.shape[0])
    in_group = index < jnp.sum(group_sizes)
    return jnp.where(in_group[:, None], y, 0)


def _apply_own(
    dispatch: Dispatch,
    apply: ApplyExperts,
    rows: Float[Array, "rows D"],
    expert_of_row: Int[Array, "rows"],
) -> Float[Array, "rows D"]:
    """Returns the outputs of this device's experts, and 0 for rows of others."""
    count = dispatch.local_experts
    # Device 1 with experts 4 to 7: rows of the experts [2, 5, 8] -> [4, 1, 4], where 4 is none.
    first = jax.lax.axis_index(dispatch.axis) * count
    local = expert_of_row - first
    is_here = (local >= 0) & (local < count)
    local = jnp.where(is_here, local, count)
    return _apply_sorted(apply, rows, local, count)


def _apply_exchanged(
    dispatch: Dispatch,
    apply: ApplyExperts,
    rows: Float[Array, "rows D"],
    expert_of_row: Int[Array, "rows"],
    capacity: int,
) -> tuple[Float[Array, "rows D"], Int[Array, ""]]:
    """Sends rows to the devices of their experts, and returns the outputs that come back, and how
    many rows were not taken.
    """
    num_rows = rows.shape[0]
    # Sorted by expert, so that the rows for each device follow each other.
    order = jnp.argsort(expert_of_row, stable=True)
    inverse = jnp.argsort(order)
    sizes = jnp.bincount(expert_of_row, length=dispatch.num_experts)
    sizes = sizes.astype(jnp.int32)

    # [sources, E] -> [sources, targets, experts of a target]
    all_sizes = jax.lax.all_gather(sizes, dispatch.axis)
    by_target = all_sizes.reshape(dispatch.devices, dispatch.devices, -1)
    rows_by_target = by_target.sum(axis=2)
    route = plan_route(rows_by_target, capacity)

    here = jax.lax.axis_index(dispatch.axis)
    sorted_rows = _permute(rows, order, inverse)
    arrived = send_rows(sorted_rows, route, dispatch.axis, capacity)
    sizes_here = by_target[:, here]
    expert_of_arrived = _arrived_experts(route, sizes_here, here, capacity)
    y = _apply_sorted(apply, arrived, expert_of_arrived, dispatch.local_experts)

    back = route.reversed()
    returned = send_rows(y, back, dispatch.axis, num_rows)
    in_order = _permute(returned, inverse, order)

    sent = jnp.sum(route.counts[here])
    lost = jnp.sum(sizes) - sent
    return in_order, lost


def _arrived_experts(
    route: Route, sizes: Int[Array, "sources E"], here: Int[Array, ""], capacity: int
) -> Int[Array, "capacity"]:
    """Returns the expert, among this device's, of each row that arrived; their number for none.

    Args:
      route: of the rows.
      sizes: rows of each source for each expert of this device.
      here: the place of this device.
      capacity: rows of the buffer.
    """
    place = jnp.arange(capacity)
    counts = route.counts[:, here]
    ends = jnp.cumsum(counts)
    # Sources send 2 and 3 rows: places 0 to 6 have the sources [0 0 1 1 1 - -].
    source = jnp.searchsorted(ends, place, side="right")
    is_row = place < ends[-1]
    last_source = counts.shape[0] - 1
    source = jnp.minimum(source, last_source)

    # A source's rows are sorted by expert: 2 of expert 0 and 1 of expert 1 end at [2, 3]; its row
    # with index 2 is of expert 1.
    first_place = route.target_offsets[source, here]
    index = place - first_place
    ends_of_sources = jnp.cumsum(sizes, axis=1)
    expert_ends = ends_of_sources[source]
    # [capacity, 1] against [capacity, E]
    is_past_expert = index[:, None] >= expert_ends
    expert = jnp.sum(is_past_expert, axis=1)
    no_expert = sizes.shape[1]
    expert = jnp.where(is_row, expert, no_expert)
    return expert.astype(jnp.int32)


@jax.custom_vjp
def _permute(
    x: Float[Array, "rows D"], order: Int[Array, "rows"], inverse: Int[Array, "rows"]
) -> Float[Array, "rows D"]:
    """Returns x[order]; with the inverse order, the gradient is a gather too instead of a
    scatter.
    """
    return x[order]


def _permute_forward(x: Array, order: Array, inverse: Array) -> tuple[Array, Array]:
    return x[order], inverse


def _permute_backward(inverse: Array, g: Array) -> tuple[Array, None, None]:
    return g[inverse], None, None


_permute.defvjp(_permute_forward, _permute_backward)

"""Which scores a device of a ring computes for the keys of another one."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.core.trees import node
from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.passes import Passes
from research.kernels.attention.terms import ScoreTerms
from research.parallel.exchange import Ring


@node(static=())
@dataclasses.dataclass(frozen=True)
class RingKeys:
    """What travels: the keys of a device, and what the mask knows of them.

    Attributes:
      k, v: keys and values.
      segments, positions: as of `AttentionMask`, or None.
    """

    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]
    segments: Int[Array, "B S"] | None
    positions: Int[Array, "B S"] | None

    def part(self, keys: slice) -> "RingKeys":
        """Returns some of the keys."""
        return jax.tree.map(lambda x: x[:, keys], self)


class Visit(NamedTuple):
    """A part of the scores that a device computes in one step.

    Attributes:
      queries, keys: those that take part.
      causal: whether some of them are hidden by their order.
      by_position: whether the mask needs their positions in the row.
    """

    queries: slice
    keys: slice
    causal: bool
    by_position: bool


@dataclasses.dataclass(frozen=True)
class RingPlan:
    """The static part of a call.

    Attributes:
      passes: the implementation that computes a block of scores.
      ring: the devices.
      zigzag: whether tokens are in the order of `to_zigzag`.
    """

    passes: Passes
    ring: Ring
    zigzag: bool


@dataclasses.dataclass(frozen=True)
class RingCall:
    """The queries of a device, and what decides which keys they see.

    Attributes:
      q: the queries.
      mask: of this device's tokens.
      terms: without sinks.
      plan: the static part.
    """

    q: Float[Array, "B T N H"]
    mask: AttentionMask
    terms: ScoreTerms
    plan: RingPlan


def visit_keys(
    call: RingCall,
    step: int | Array,
    keys: RingKeys,
    visit: Callable[[Visit, Array, RingKeys], Any],
    nothing: Callable[[], Any],
) -> Any:
    """Computes the scores of the queries here and the keys of one device, as far as they may be
    visible.

    Args:
      call: the queries.
      step: 0 for the keys of this device, 1 for those of the device before it, ….
      keys: of that device.
      visit: computes a part of the scores.
      nothing: what comes of no scores.
    """
    mask = call.mask
    plan = call.plan
    place = plan.ring.index()
    source = (place - step) % plan.ring.size
    own = isinstance(step, int) and step == 0
    everything = slice(None)
    if plan.zigzag and not own:
        # Of a device before this one, both halves of the queries see the first half of the keys
        # and none the second, which is near the end of the row. Of a device after it, the second
        # half of the queries sees all keys, and the first none.
        half = keys.k.shape[1] // 2
        by_position = call.terms.alibi is not None
        before = Visit(everything, slice(0, half), False, by_position)
        after = Visit(slice(half, None), everything, False, by_position)
        return jax.lax.cond(
            source < place,
            lambda: visit(before, source, keys),
            lambda: visit(after, source, keys),
        )

    in_order = mask.prefix is None and mask.q_positions is None
    if not in_order:
        return visit(Visit(everything, everything, mask.causal, True), source, keys)
    if own:
        # Distances are those of the indices, unless two halves of the row lie side by side.
        by_position = plan.zigzag and call.terms.alibi is not None
        return visit(Visit(everything, everything, mask.causal, by_position), source, keys)

    # All keys of a device before this one come before the queries.
    by_position = mask.window is not None or call.terms.alibi is not None
    whole = Visit(everything, everything, False, by_position)
    visible = _any_visible(mask, place, source, keys.k.shape[1])
    if visible is None:
        return visit(whole, source, keys)
    return jax.lax.cond(visible, lambda: visit(whole, source, keys), nothing)


def _any_visible(
    mask: AttentionMask, place: Array, source: Array, length: int
) -> Bool[Array, ""] | None:
    """Returns whether a query of this device sees a key of another; None where it always may.

    Args:
      mask: of tokens in their order.
      place, source: of both devices.
      length: tokens of a device.
    """
    visible = None
    if mask.causal:
        visible = source < place
    if mask.window is not None:
        # Devices 0 and 2 of 4 tokens each: tokens 3 and 8 are the nearest, at a distance of 5.
        distance = (jnp.abs(place - source) - 1) * length + 1
        near = distance < mask.window
        visible = near if visible is None else visible & near
    return visible


def visit_terms(
    call: RingCall, visit: Visit, source: Array, keys: RingKeys
) -> tuple[AttentionMask, ScoreTerms]:
    """Returns the mask and the terms of some of the scores."""
    mask = call.mask
    terms = call.terms
    plan = call.plan
    part = keys.part(visit.keys)
    changes: dict[str, Any] = {"causal": visit.causal, "kv_segments": part.segments}
    if mask.q_segments is not None:
        changes["q_segments"] = mask.q_segments[:, visit.queries]
    if visit.by_position:
        q_positions = mask.q_positions
        if q_positions is None:
            q_positions = _positions(plan, plan.ring.index(), call.q)
        kv_positions = keys.positions
        if kv_positions is None:
            kv_positions = _positions(plan, source, keys.k)
        changes["q_positions"] = q_positions[:, visit.queries]
        changes["kv_positions"] = kv_positions[:, visit.keys]

    if terms.bias is not None and terms.bias.shape[3] > 1:
        # A bias [#B, #N, T, S of the row]: the columns of the device that the keys are of.
        length = keys.k.shape[1]
        columns = jax.lax.dynamic_slice_in_dim(terms.bias, source * length, length, axis=3)
        terms = dataclasses.replace(terms, bias=columns)
    return dataclasses.replace(mask, **changes), terms


def _positions(plan: RingPlan, place: Array, x: Float[Array, "B T _ H"]) -> Int[Array, "B T"]:
    """Returns the positions in the row of a device's tokens."""
    batch, length, _, _ = x.shape
    if plan.zigzag:
        # Device 1 of 4 with 6 tokens has halves 1 and 6: tokens 3 to 5 and 18 to 20.
        half = length // 2
        index = jnp.arange(half, dtype=jnp.int32)
        last = 2 * plan.ring.size - 1
        positions = jnp.concatenate([place * half + index, (last - place) * half + index])
    else:
        positions = place * length + jnp.arange(length, dtype=jnp.int32)
    return jnp.broadcast_to(positions, (batch, length))

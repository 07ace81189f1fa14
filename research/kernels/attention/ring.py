"""Ring attention: keys and values travel from device to device, each of which has some queries.

Each device holds consecutive tokens of every row. It attends to its own keys first, and then to
those of each other device, which arrive one after the other; the results are merged by their
logsumexp. In the backward pass the gradients of keys and values travel with them.

Under a plain causal mask the tokens are exchanged first (`parallel.exchange.to_zigzag`), so that
every device computes the same number of scores in each step.

Source: Liu et al. 2023, arXiv:2310.01889, algorithm 1; the balanced order: Brandon et al. 2023
(Striped Attention), arXiv:2311.09431, section 3, with two halves of a sequence on a device instead
of stripes.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.passes import (
    ForwardResult,
    Passes,
    empty_result,
    merge,
    sink_gradient,
    with_sinks,
)
from research.kernels.attention.ring_visits import (
    RingCall,
    RingKeys,
    RingPlan,
    Visit,
    visit_keys,
    visit_terms,
)
from research.kernels.attention.terms import ScoreTerms
from research.parallel.exchange import Ring, from_zigzag, to_zigzag


def ring_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
    passes: Passes,
    ring: Ring,
) -> Float[Array, "B T N H"]:
    """Returns the attention of this device's queries over the keys of all devices of its ring.

    Args:
      q, k, v: this device's; consecutive tokens of each row.
      mask: with this device's segments and positions; its index counts from its own first token.
      terms: with this device's rows of a bias, and all of its columns.
      passes: the implementation that computes a block of scores.
      ring: the devices.
    """
    zigzag = _is_balanced_by_zigzag(q, k, mask, terms)
    plan = RingPlan(passes, ring, zigzag)
    if not zigzag:
        return _ring_attention(q, k, v, mask, terms, plan)

    exchange = functools.partial(to_zigzag, ring, axis=1)
    mask = jax.tree.map(exchange, mask)
    q = exchange(q)
    k = exchange(k)
    v = exchange(v)
    out = _ring_attention(q, k, v, mask, terms, plan)
    return from_zigzag(ring, out, axis=1)


def _is_balanced_by_zigzag(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], mask: AttentionMask, terms: ScoreTerms
) -> bool:
    """Whether the devices' scores are visible by causal order alone, and so in need of balance."""
    # What depends on the place of a token, and not only on the order of tokens.
    needs_places = (
        mask.prefix is not None
        or mask.q_positions is not None
        or mask.window is not None
        or terms.bias is not None
    )
    queries = q.shape[1]
    keys = k.shape[1]
    has_halves = queries == keys and queries % 2 == 0
    return mask.causal and has_halves and not needs_places


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ring_attention(
    q: Array, k: Array, v: Array, mask: AttentionMask, terms: ScoreTerms, plan: RingPlan
) -> Array:
    out, _ = _forward(q, k, v, mask, terms, plan)
    return out


def _forward(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
    plan: RingPlan,
) -> tuple[Float[Array, "B T N H"], tuple]:
    ring = plan.ring
    call = _call(q, mask, terms, plan)
    here = RingKeys(k, v, mask.kv_segments, mask.kv_positions)
    visit = functools.partial(_attend, call)

    def nothing() -> ForwardResult:
        return empty_result(q)

    def attend(step: int | Array, keys: RingKeys) -> ForwardResult:
        return visit_keys(call, step, keys, visit, nothing)

    def move_and_attend(carry: tuple[RingKeys, ForwardResult], step: Array) -> tuple[Any, None]:
        keys, result = carry
        # The next device's keys travel while these are attended to.
        following = ring.rotate(keys)
        found = attend(step, keys)
        result = merge(result, found)
        return (following, result), None

    # The keys of this device, those of all but one other, and the last ones, which go no further.
    # Of 4 devices: step 0, steps 1 and 2 in the loop, and step 3.
    keys = ring.rotate(here)
    result = attend(0, here)
    last_step = ring.size - 1
    steps = jnp.arange(1, last_step)
    (keys, result), _ = jax.lax.scan(move_and_attend, (keys, result), steps)
    found = attend(last_step, keys)
    result = merge(result, found)

    # Once, after all keys.
    if terms.sinks is not None:
        result = with_sinks(result, terms.sinks)
    out = result.out.astype(v.dtype)
    saved = ForwardResult(out, result.lse)
    residuals = (q, k, v, mask, terms, saved)
    return out, residuals


def _call(
    q: Float[Array, "B T N H"], mask: AttentionMask, terms: ScoreTerms, plan: RingPlan
) -> RingCall:
    """Returns the call of each visit: without sinks, which count once and not for each device."""
    terms = dataclasses.replace(terms, sinks=None)
    return RingCall(q, mask, terms, plan)


def _backward(plan: RingPlan, residuals: tuple, g: Float[Array, "B T N H"]) -> tuple:
    q, k, v, mask, terms, result = residuals
    g = g.astype(q.dtype)
    ring = plan.ring
    call = _call(q, mask, terms, plan)
    here = RingKeys(k, v, mask.kv_segments, mask.kv_positions)
    visit = functools.partial(_gradients, call, result, g)

    def gradients(step: int | Array, keys: RingKeys) -> _Gradients:
        nothing = functools.partial(_zero_gradients, call, keys)
        return visit_keys(call, step, keys, visit, nothing)

    def move_and_add(carry: tuple[RingKeys, _Gradients], step: Array) -> tuple[Any, None]:
        keys, total = carry
        following = ring.rotate(keys)
        arrived = total.rotated(ring)
        found = gradients(step, keys)
        total = _added(arrived, found)
        return (following, total), None

    # As in the forward pass; the gradients of keys follow them, and go on to the device that has
    # the keys: the one after the last device that they came to.
    keys = ring.rotate(here)
    total = gradients(0, here)
    last_step = ring.size - 1
    steps = jnp.arange(1, last_step)
    (keys, total), _ = jax.lax.scan(move_and_add, (keys, total), steps)
    found = gradients(last_step, keys)
    arrived = total.rotated(ring)
    total = _added(arrived, found)
    total = total.rotated(ring)

    dq = total.q.astype(q.dtype)
    dk = total.k.astype(k.dtype)
    dv = total.v.astype(v.dtype)
    dterms = _term_gradients(terms, total, result, g)
    return dq, dk, dv, None, dterms


_ring_attention.defvjp(_forward, _backward)


class _Gradients(NamedTuple):
    """Sums over some of the scores, in float32.

    Attributes:
      q, bias: of this device's queries; a bias or None.
      k, v: of the keys of one device.
    """

    q: Float[Array, "B T N H"]
    bias: Float[Array, "#B #N #T #S"] | None
    k: Float[Array, "B S K H"]
    v: Float[Array, "B S K H"]

    def rotated(self, ring: Ring) -> "_Gradients":
        """Returns the sums of the device before this one in the place of those of the keys."""
        k, v = ring.rotate((self.k, self.v))
        return self._replace(k=k, v=v)


def _zero_gradients(call: RingCall, keys: RingKeys) -> _Gradients:
    def zeros(x: Array) -> Array:
        return jnp.zeros(x.shape, jnp.float32)

    arrays = _Gradients(call.q, call.terms.bias, keys.k, keys.v)
    return jax.tree.map(zeros, arrays)


def _added(a: _Gradients, b: _Gradients) -> _Gradients:
    return jax.tree.map(jnp.add, a, b)


def _term_gradients(
    terms: ScoreTerms, total: _Gradients, result: ForwardResult, g: Float[Array, "B T N H"]
) -> ScoreTerms:
    """Returns the gradients of the terms, in a value of their class."""
    dterms: dict[str, Array] = {}
    if terms.bias is not None:
        dterms["bias"] = total.bias.astype(terms.bias.dtype)
    if terms.alibi is not None:
        dterms["alibi"] = jnp.zeros_like(terms.alibi)
    if terms.sinks is not None:
        dterms["sinks"] = sink_gradient(terms.sinks, result, g)
    return dataclasses.replace(terms, **dterms)


def _attend(call: RingCall, visit: Visit, source: Array, keys: RingKeys) -> ForwardResult:
    """Returns the result of all queries over some keys of one device."""
    mask, terms = visit_terms(call, visit, source, keys)
    part = keys.part(visit.keys)
    queries = visit.queries
    q = call.q[:, queries]
    passes = call.plan.passes
    found = passes.forward_pass(q, part.k, part.v, mask, terms)

    # Queries that take no part attend to nothing.
    empty = empty_result(call.q)
    found_out = found.out.astype(jnp.float32)
    out = empty.out.at[:, queries].set(found_out)
    lse = empty.lse.at[:, queries].set(found.lse)
    return ForwardResult(out, lse)


def _gradients(
    call: RingCall,
    result: ForwardResult,
    g: Float[Array, "B T N H"],
    visit: Visit,
    source: Array,
    keys: RingKeys,
) -> _Gradients:
    """Returns the gradients from the scores of some queries and some keys of one device.

    Args:
      call: the queries.
      result: of all keys.
      g: the gradient of its output.
      visit: which scores.
      source: the device of the keys.
      keys: all of that device.
    """
    mask, terms = visit_terms(call, visit, source, keys)
    part = keys.part(visit.keys)
    queries = visit.queries
    part_out = result.out[:, queries]
    part_lse = result.lse[:, queries]
    part_result = ForwardResult(part_out, part_lse)
    part_q = call.q[:, queries]
    part_g = g[:, queries]
    passes = call.plan.passes
    dq, dk, dv, dterms = passes.backward_pass(
        part_q, part.k, part.v, mask, terms, part_result, part_g
    )

    # In float32, and in the places of the part: queries 4 to 7 and keys 0 to 3 of 8.
    zero = _zero_gradients(call, keys)
    dq = dq.astype(jnp.float32)
    q = zero.q.at[:, queries].set(dq)
    dk = dk.astype(jnp.float32)
    k = zero.k.at[:, visit.keys].set(dk)
    dv = dv.astype(jnp.float32)
    v = zero.v.at[:, visit.keys].set(dv)
    bias = None
    if call.terms.bias is not None:
        bias = _put_columns(call.terms.bias, dterms.bias, source, keys)
    return _Gradients(q, bias, k, v)


def _put_columns(
    bias: Float[Array, "#B #N #T #S"], found: Float[Array, "..."], source: Array, keys: RingKeys
) -> Float[Array, "#B #N #T #S"]:
    """Returns the gradient of a bias that is 0 but for the columns of one device's keys."""
    found = found.astype(jnp.float32)
    if bias.shape[3] == 1:
        return found
    zeros = jnp.zeros(bias.shape, jnp.float32)
    # Device 2 has the keys 16 to 23 of 8 a device.
    keys_a_device = keys.k.shape[1]
    start = source * keys_a_device
    return jax.lax.dynamic_update_slice_in_dim(zeros, found, start, axis=3)

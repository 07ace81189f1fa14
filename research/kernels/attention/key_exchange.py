"""How queries meet the keys of other devices, where the mesh shards the tokens of each row.

It is exact in every form, with every mask and every term of the scores.
"""

import dataclasses
import math
from collections.abc import Callable
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from research.core.errors import UserError
from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.ring import ring_attention
from research.kernels.attention.terms import ScoreTerms
from research.parallel.exchange import Ring


@dataclasses.dataclass(frozen=True)
class KeyExchange:
    """The exchange, of devices along the mesh axis `context`.

    Attributes:
      kind: `ring` sends keys and values from device to device while they are attended to;
          `all_gather` copies all of them to every device first.
      all_to_all: devices of a group, in which each takes some heads of all tokens of the group in
          exchange for its tokens of the other heads; a divisor of `mesh.context` and of the query
          heads. Groups exchange keys by `kind`. 1 exchanges no heads, `mesh.context` no keys.

    Source: all-to-all: Jacobs et al. 2023 (DeepSpeed Ulysses), arXiv:2309.14509, section 3.1; both
    together: Fang & Zhao 2024, arXiv:2405.07719, section 3.2.
    """

    kind: Literal["ring", "all_gather"] = "ring"
    all_to_all: int = 1

    def __post_init__(self) -> None:
        if self.all_to_all < 1:
            raise UserError("all_to_all", self.all_to_all, "must be at least 1.")

    def check_groups(self, devices: int, heads: int) -> None:
        """Raises UserError where groups do not divide the devices, or the heads.

        Args:
          devices: along the mesh axis `context`.
          heads: query heads of a device.
        """
        numbers = {
            "mesh.context": devices,
            "the query heads of a device": heads,
        }
        for what, number in numbers.items():
            if number % self.all_to_all:
                nearest = math.gcd(devices, heads)
                raise UserError(
                    "model.attention.exchange.all_to_all",
                    self.all_to_all,
                    f"does not divide {what} = {number}. Use {nearest}.",
                )


def exchange_and_attend(
    exchange: KeyExchange,
    implementation: ModuleType,
    axis: str,
    size: int,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> Float[Array, "B T N H"]:
    """Returns the attention of a device's queries over the keys of all devices along an axis.

    Args:
      exchange: how they meet.
      implementation: a module with `attention` and the functions of `passes.Passes`.
      axis: mesh axis that shards the tokens of a row.
      size: devices along it.
      q, k, v, mask: of this device's tokens; indices of tokens count from its own first one.
      terms: with this device's rows of a bias, and all of its columns.

    Raises:
      UserError: groups do not divide the devices, or the heads.
    """
    exchange.check_groups(size, heads=q.shape[2])
    group = exchange.all_to_all
    groups = size // group
    ring = Ring(axis, groups, group)
    if group == 1:
        return _attend(exchange, implementation, ring, q, k, v, mask, terms)

    # 2 key/value heads in groups of 4: each head twice, so that every device gets one.
    kv_heads = k.shape[2]
    copies = math.lcm(kv_heads, group) // kv_heads
    k = jnp.repeat(k, copies, axis=2)
    v = jnp.repeat(v, copies, axis=2)
    q = _heads_for_tokens(ring, q)
    k = _heads_for_tokens(ring, k)
    v = _heads_for_tokens(ring, v)

    def gather(x: Array) -> Array:
        return _gather_group(ring, x, axis=1)

    mask = _mask_of_tokens(mask, gather)
    terms = _terms_of_heads(ring, terms)
    out = _attend(exchange, implementation, ring, q, k, v, mask, terms)
    return _tokens_for_heads(ring, out)


def _attend(
    exchange: KeyExchange,
    implementation: ModuleType,
    ring: Ring,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> Float[Array, "B T N H"]:
    """Returns the attention over the keys of a ring."""
    if ring.size == 1:
        return implementation.attention(q, k, v, mask, terms)
    if exchange.kind == "ring":
        return ring_attention(q, k, v, mask, terms, implementation, ring)

    # Which queries see which keys follows from their positions in the row.
    batch, queries, _, _ = q.shape
    if mask.q_positions is None:
        # Device 1 of 4 queries each: positions 4, 5, 6 and 7 of every row
        first = ring.index() * queries
        positions = first + jnp.arange(queries, dtype=jnp.int32)
        positions = jnp.broadcast_to(positions, (batch, queries))
        mask = dataclasses.replace(mask, q_positions=positions)

    def gather(x: Array) -> Array:
        return _gather_ring(ring, x, axis=1)

    of_keys = {"kv_segments": mask.kv_segments, "kv_positions": mask.kv_positions}
    of_all_keys = jax.tree.map(gather, of_keys)
    mask = dataclasses.replace(mask, **of_all_keys)
    k = gather(k)
    v = gather(v)
    return implementation.attention(q, k, v, mask, terms)


def _mask_of_tokens(mask: AttentionMask, change: Callable[[Array], Array]) -> AttentionMask:
    """Returns the mask with its arrays over tokens changed; a prefix is a number per row."""
    names = ("q_segments", "kv_segments", "q_positions", "kv_positions")
    arrays = {name: getattr(mask, name) for name in names}
    changed = jax.tree.map(change, arrays)
    return dataclasses.replace(mask, **changed)


def _heads_for_tokens(ring: Ring, x: Float[Array, "B T heads H"]) -> Float[Array, "B more fewer H"]:
    """Returns some heads of the tokens of a group, from all heads of this device's tokens."""
    # 2 devices of a group, each with [B, 4, 6, H] -> [B, 8, 3, H]
    return jax.lax.all_to_all(
        x, ring.axis, split_axis=2, concat_axis=1, tiled=True, axis_index_groups=ring.groups()
    )


def _tokens_for_heads(ring: Ring, x: Float[Array, "B T heads H"]) -> Float[Array, "B fewer more H"]:
    """Returns the inverse of `_heads_for_tokens`."""
    return jax.lax.all_to_all(
        x, ring.axis, split_axis=1, concat_axis=2, tiled=True, axis_index_groups=ring.groups()
    )


def _gather_group(ring: Ring, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    """Returns the parts of all devices of this device's group, joined along an axis."""
    return jax.lax.all_gather(x, ring.axis, axis=axis, tiled=True, axis_index_groups=ring.groups())


def _gather_ring(ring: Ring, x: Shaped[Array, "..."], axis: int) -> Shaped[Array, "..."]:
    """Returns the parts of all devices of this device's ring, joined along an axis."""
    # Groups [0, 1] and [2, 3]: rings [0, 2] and [1, 3]
    rings = [list(devices) for devices in zip(*ring.groups(), strict=True)]
    return jax.lax.all_gather(x, ring.axis, axis=axis, tiled=True, axis_index_groups=rings)


def _terms_of_heads(ring: Ring, terms: ScoreTerms) -> ScoreTerms:
    """Returns the terms of the heads that this device takes in the exchange."""
    member = jax.lax.axis_index(ring.axis) % ring.group_size

    def own(x: Array, axis: int) -> Array:
        # 8 heads in groups of 4: member 2 takes heads 4 and 5.
        size = x.shape[axis] // ring.group_size
        start = member * size
        return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

    changes = {}
    if terms.alibi is not None:
        changes["alibi"] = own(terms.alibi, 0)
    if terms.sinks is not None:
        changes["sinks"] = own(terms.sinks, 0)
    if terms.bias is not None:
        bias = terms.bias
        if bias.shape[2] > 1:
            bias = _gather_group(ring, bias, axis=2)
        if bias.shape[1] > 1:
            bias = own(bias, 1)
        changes["bias"] = bias
    return dataclasses.replace(terms, **changes)

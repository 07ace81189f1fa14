"""The scores of a tile in a warpgroup's registers: the terms and the mask, for all GPU kernels.

A warpgroup holds a tile `[T, S]`, or `[S, T]` in the kernel that sums over queries. Scores are in
units of log 2, since the GPU computes 2^x faster than e^x.
"""

import dataclasses
from typing import Any, Literal

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from research.kernels.attention.gpu_plan import Plan
from research.kernels.attention.gpu_tile import HIDDEN, LOG2E, along, load, spread

# The names of the queries' and the keys' arrays start with it: `q_positions`, `kv_segments`.
Side = Literal["q", "kv"]


@dataclasses.dataclass(frozen=True)
class Tile:
    """The position of a tile of scores in `[B, N, T, S]`.

    Attributes:
      batch, head: indices, traced.
      query, key: the first of each, traced.
      shape: rows and columns.
      transposed: whether the rows are keys.
    """

    batch: Array
    head: Array
    query: Array
    key: Array
    shape: tuple[int, int]
    transposed: bool = False

    @property
    def sides(self) -> tuple[Side, Side]:
        """Which side's tokens are the rows, and which are the columns."""
        return ("kv", "q") if self.transposed else ("q", "kv")

    def axis(self, side: Side) -> int:
        """Returns the axis along which the tokens of a side run."""
        return self.sides.index(side)

    def tokens(self, side: Side) -> pl.Slice:
        """Returns the tokens of a side."""
        start = self.query if side == "q" else self.key
        size = self.shape[self.axis(side)]
        return pl.ds(start, size)


def scores(
    plan: Plan,
    extras: dict[str, Any],
    raw: Float[Array, "rows columns"],
    tile: Tile,
    *,
    masked: bool,
) -> tuple[Float[Array, "rows columns"], Float[Array, "rows columns"] | None]:
    """Returns the scores of a tile times log₂e, and the derivative of the cap.

    A score is `HIDDEN` where the mask says so. The derivative is None where there is no cap.

    Args:
      plan: the static plan.
      extras: the arrays of `gpu_plan.extra_arrays`.
      raw: q kᵀ, or k qᵀ of a transposed tile.
      tile: its position.
      masked: whether the mask hides anything here.
    """
    cap_derivative = None
    if plan.softcap is None and "bias" not in extras and "alibi" not in extras:
        # One multiplication per score.
        out = raw * (plan.scale * LOG2E)
    else:
        out, cap_derivative = _with_terms(plan, extras, raw, tile)
        out *= LOG2E

    # Nearly all blocks of a long causal sequence are visited without this.
    visible = None
    if masked:
        visible = _visible(plan, extras, tile)
    if visible is not None:
        out = jnp.where(visible, out, HIDDEN)
    return out, cap_derivative


def _with_terms(
    plan: Plan, extras: dict[str, Any], raw: Float[Array, "rows columns"], tile: Tile
) -> tuple[Float[Array, "rows columns"], Float[Array, "rows columns"] | None]:
    """Returns cap(scale · raw) + bias − alibi · distance, and the derivative of the cap."""
    out = raw * plan.scale

    # d/dx c tanh(x / c) = 1 - tanh(x / c)²
    cap_derivative = None
    if plan.softcap is not None:
        bounded = jnp.tanh(out * (1.0 / plan.softcap))
        cap_derivative = 1.0 - bounded * bounded
        out = bounded * plan.softcap

    if "alibi" in extras:
        p_t = _positions(plan, extras, tile, "q")
        p_s = _positions(plan, extras, tile, "kv")
        distance = jnp.abs((p_t - p_s).astype(jnp.float32))
        out -= distance * extras["alibi"][tile.head]

    if "bias" in extras:
        out += _bias(plan, extras["bias"], tile)
    return out, cap_derivative


def _visible(plan: Plan, extras: dict[str, Any], tile: Tile) -> Bool[Array, "rows columns"] | None:
    """Returns which pairs of a tile are visible; None where the mask hides nothing in any tile."""
    conditions = []
    if plan.causal or plan.window is not None:
        p_t = _positions(plan, extras, tile, "q")
        p_s = _positions(plan, extras, tile, "kv")
        if plan.causal:
            conditions.append(p_t >= p_s)
        if plan.window is not None:
            # |p_t - p_s| < window
            distance = p_t - p_s
            conditions.append(distance < plan.window)
            conditions.append(distance > -plan.window)
        if "prefix" in extras:
            # What causality and window hide, the prefix shows; segments still hide it.
            in_prefix = p_s < extras["prefix"][tile.batch]
            conditions = [_all(conditions) | in_prefix]

    if "q_segments" in extras:
        q_segments = _tokens(plan, extras["q_segments"], tile, "q")
        kv_segments = _tokens(plan, extras["kv_segments"], tile, "kv")
        conditions.append(q_segments == kv_segments)
        conditions.append(kv_segments != 0)
    elif plan.keys != plan.padded_keys:
        # Padded keys: where there are segments, theirs is 0.
        conditions.append(_indices(plan, tile, "kv") < plan.keys)
    return _all(conditions) if conditions else None


def _all(conditions: list[Array]) -> Array:
    out = conditions[0]
    for condition in conditions[1:]:
        out = out & condition
    return out


def _positions(plan: Plan, extras: dict[str, Any], tile: Tile, side: Side) -> Array:
    """Returns the positions of one side's tokens: the indices, where none are given."""
    name = f"{side}_positions"
    if name in extras:
        return _tokens(plan, extras[name], tile, side)
    return _indices(plan, tile, side)


def _indices(plan: Plan, tile: Tile, side: Side) -> Array:
    """Returns the indices of one side's tokens, broadcast over the other side."""
    offsets = lax.broadcasted_iota(jnp.int32, tile.shape, tile.axis(side))
    return spread(plan, offsets) + tile.tokens(side).start


def _tokens(plan: Plan, ref: Any, tile: Tile, side: Side) -> Array:
    """Loads one number per token of one side, broadcast over the other side."""
    axis = tile.axis(side)
    index = (tile.batch, tile.tokens(side))
    # [B, T] -> [T] -> [T, S]
    vector = load(plan, ref, index, axis)
    return along(vector, axis, tile.shape)


def _bias(plan: Plan, ref: Any, tile: Tile) -> Float[Array, "rows columns"] | Float[Array, ""]:
    """Loads the bias of a tile from `[#B, #N, #T, #S]`; a number where both T and S are broadcast.

    The bias of a transposed tile is transposed too, `[#B, #N, #S, #T]`.
    """
    batches, heads, *lengths = ref.shape
    index = [tile.batch if batches > 1 else 0, tile.head if heads > 1 else 0]
    # Axes of size 1 are broadcast: [B, N, 1, S] is loaded as a vector along axis 1.
    long_axes = []
    for axis, side in enumerate(tile.sides):
        if lengths[axis] > 1:
            index.append(tile.tokens(side))
            long_axes.append(axis)
        else:
            index.append(0)

    if not long_axes:
        return ref[tuple(index)].astype(jnp.float32)
    if len(long_axes) == 2:
        return load(plan, ref, tuple(index)).astype(jnp.float32)
    (axis,) = long_axes
    vector = load(plan, ref, tuple(index), axis)
    return along(vector.astype(jnp.float32), axis, tile.shape)

"""What the GPU kernels of attention are built from: a static plan, padded operands, and which
blocks meet which.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.kernels.rounding import round_up

# Rows of one warpgroup's matmul, and the two warpgroups that compute in a block.
ROWS = 64
WARPGROUPS = 2
TILE = ROWS * WARPGROUPS
# Elements of 16 bits in the widest swizzle of shared memory.
SWIZZLED = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when a kernel is traced.

    Attributes:
      queries, keys: T and S, before they are padded to whole tiles.
      group: query heads a key head.
      causal, window: of the mask.
      softcap, scale: of the terms.
      interpret: run on the CPU by JAX's interpreter of GPU kernels.
    """

    queries: int
    keys: int
    group: int
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    interpret: bool

    @property
    def padded_queries(self) -> int:
        """T in whole tiles."""
        return round_up(self.queries, TILE)

    @property
    def padded_keys(self) -> int:
        """S in whole tiles."""
        return round_up(self.keys, TILE)


def _fill(x: Array, *sizes: int) -> Array:
    """Pads the trailing axes with zeros up to `sizes`, copying nothing where they are reached."""
    amounts = [(0, 0)] * (x.ndim - len(sizes)) + [
        (0, b - a) for a, b in zip(x.shape[-len(sizes) :], sizes, strict=True)
    ]
    return jnp.pad(x, amounts) if any(after for _, after in amounts) else x


def pad_tokens(x: Array) -> Array:
    """Returns `[B, T, N, H]` in whole tiles of tokens and whole swizzles of the head width."""
    _, length, heads, width = x.shape
    return _fill(x, round_up(length, TILE), heads, round_up(width, SWIZZLED))


def extras(mask: AttentionMask, terms: ScoreTerms, plan: Plan) -> dict[str, Array]:
    """Returns the arrays of the mask and the terms that are there, by name, padded as the kernels
    read them.
    """
    tokens = {
        "q_segments": plan.padded_queries,
        "kv_segments": plan.padded_keys,
        "q_positions": plan.padded_queries,
        "kv_positions": plan.padded_keys,
    }
    found = {name: getattr(mask, name) for name in tokens}
    found = {
        name: _fill(x.astype(jnp.int32), tokens[name]) for name, x in found.items() if x is not None
    }
    if mask.prefix is not None and (mask.causal or mask.window is not None):
        found["prefix"] = mask.prefix.astype(jnp.int32)
    for name in ("sinks", "alibi"):
        if getattr(terms, name) is not None:
            found[name] = getattr(terms, name).astype(jnp.float32)
    if terms.bias is not None:
        *_, rows, columns = terms.bias.shape
        sizes = (plan.padded_queries if rows > 1 else 1, plan.padded_keys if columns > 1 else 1)
        found["bias"] = _fill(terms.bias, *sizes)
    return found


def block_kinds(
    mask: AttentionMask, plan: Plan, block_q: int, block_kv: int
) -> Int[Array, "C I J"]:
    """Returns of each block of queries and of keys 0 where all is visible, 1 where some may be, 2
    where nothing is.

    It looks at the least and the greatest position and segment of a block, so that its work is that
    of one number a block. C is B, or 1 where no sequence differs from another.

    Args:
      mask: the description.
      plan: the lengths.
      block_q, block_kv: tokens a block; they divide the padded lengths.
    """
    low_t, high_t = _range(mask.q_positions, plan.queries, plan.padded_queries, block_q)
    low_s, high_s = _range(mask.kv_positions, plan.keys, plan.padded_keys, block_kv)
    low_t, high_t, low_s, high_s = (
        low_t[:, :, None],
        high_t[:, :, None],
        low_s[:, None],
        high_s[:, None],
    )
    some = jnp.ones((1, plan.padded_queries // block_q, plan.padded_keys // block_kv), bool)
    every = some
    if mask.causal:
        some, every = some & (high_t >= low_s), every & (low_t >= high_s)
    if mask.window is not None:
        nearest = jnp.maximum(low_t - high_s, low_s - high_t)
        farthest = jnp.maximum(high_t - low_s, high_s - low_t)
        some, every = some & (nearest < mask.window), every & (farthest < mask.window)
    if mask.prefix is not None:
        prefix = mask.prefix[:, None, None]
        some, every = some | (low_s < prefix), every | (high_s < prefix)
    if mask.q_segments is not None:
        first_t, last_t, single_t = _documents(mask.q_segments, plan.padded_queries, block_q)
        first_s, last_s, single_s = _documents(mask.kv_segments, plan.padded_keys, block_kv)
        first_t, last_t, single_t = first_t[:, :, None], last_t[:, :, None], single_t[:, :, None]
        first_s, last_s, single_s = first_s[:, None], last_s[:, None], single_s[:, None]
        some &= (first_t <= last_s) & (first_s <= last_t)
        every &= single_t & single_s & (first_t == first_s)
    starts = jnp.arange(0, plan.padded_keys, block_kv)[None, None]
    some, every = some & (starts < plan.keys), every & (starts + block_kv <= plan.keys)
    # The last block of queries may be past the end altogether: its rows are cut off, and nothing is
    # computed for them.
    some &= (jnp.arange(0, plan.padded_queries, block_q) < plan.queries)[None, :, None]
    return jnp.where(some, jnp.where(every, 0, 1), 2).astype(jnp.int32)


def visits(kinds: Int[Array, "C I J"]) -> tuple[Int[Array, "C I J"], Int[Array, "C I 2"]]:
    """Returns for each block of I the blocks of J in the order of their visit, and two numbers.

    Blocks that are visible altogether come first and need no mask; their number is the first one.
    Then come those that are visible in part; the second number is that of both. What comes after is
    never visited.
    """
    order = jnp.argsort(kinds, axis=-1, stable=True).astype(jnp.int32)
    counts = jnp.stack([jnp.sum(kinds < 1, axis=-1), jnp.sum(kinds < 2, axis=-1)], axis=-1)
    return order, counts.astype(jnp.int32)


def _range(positions: Array | None, length: int, padded: int, block: int) -> tuple[Array, Array]:
    """Returns the least and the greatest position of each block, over the tokens that are there."""
    if positions is None:
        positions = jnp.arange(length)[None]
    positions = jnp.pad(positions, ((0, 0), (0, padded - length)), mode="edge")
    blocks = positions.reshape(positions.shape[0], -1, block)
    return jnp.min(blocks, axis=-1), jnp.max(blocks, axis=-1)


def _documents(segments: Int[Array, "B L"], padded: int, block: int) -> tuple[Array, Array, Array]:
    """Returns the least and the greatest document of each block, and whether it is one document
    without padding.
    """
    blocks = _fill(segments, padded).reshape(segments.shape[0], -1, block)
    bounds = jnp.iinfo(blocks.dtype)
    first = jnp.min(jnp.where(blocks == 0, bounds.max, blocks), axis=-1)
    last = jnp.max(jnp.where(blocks == 0, bounds.min, blocks), axis=-1)
    return first, last, (first == last) & jnp.all(blocks != 0, axis=-1)

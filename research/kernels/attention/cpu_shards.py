"""Shards of the CPU attention: sequences and heads that are computed independently.

XLA's CPU runtime runs a small matmul on one thread, but runs matmuls that do not wait for each
other on threads of their own. So a large call is cut into a few shards along the batch and the
key/value heads.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms

# The most shards of a call: more of them take longer to compile.
MAX_SHARDS = 4
# The fewest scores of a shard.
MIN_SHARD_SCORES = 2**18


@dataclasses.dataclass(frozen=True)
class Shard:
    """Sequences, key/value heads and the query heads that read them, as slices of a call."""

    sequences: slice
    kv_heads: slice
    heads: slice

    @property
    def batch(self) -> int:
        """The number of sequences."""
        sequences = self.sequences
        return sequences.stop - sequences.start

    def of_queries(self, x: Float[Array, "B T N H"]) -> Float[Array, "_ T _ H"]:
        """Returns the shard of queries, or of anything per query."""
        return x[self.sequences, :, self.heads]

    def of_keys(self, x: Float[Array, "B S K H"]) -> Float[Array, "_ S _ H"]:
        """Returns the shard of keys or values."""
        return x[self.sequences, :, self.kv_heads]

    def of_mask(self, mask: AttentionMask) -> AttentionMask:
        """Returns the mask of the shard's sequences."""
        return jax.tree.map(lambda x: x[self.sequences], mask)

    def of_terms(self, terms: ScoreTerms) -> ScoreTerms:
        """Returns the terms of the shard's sequences and heads."""
        return jax.tree.map(lambda x: x[self.term_index(x)], terms)

    def term_index(self, term: Array) -> tuple[slice, ...]:
        """Returns the index of the shard in a term `[N]` or `[#B, #N, #T, #S]`.

        An axis of size 1 is broadcast, and taken whole.
        """
        if term.ndim == 1:
            return (self.heads,)
        sequences = self.sequences if term.shape[0] > 1 else slice(None)
        heads = self.heads if term.shape[1] > 1 else slice(None)
        return sequences, heads


@dataclasses.dataclass(frozen=True)
class ShardGrid:
    """How a call is cut: a grid of shards, by sequences and by key/value heads.

    Attributes:
      batch: B.
      kv_heads: K.
      group: query heads per key/value head, G.
      batch_shards: the most shards along the batch.
      head_shards: the most shards along the key/value heads.
    """

    batch: int
    kv_heads: int
    group: int
    batch_shards: int
    head_shards: int

    def shards(self) -> list[Shard]:
        """Returns the shards row by row: all heads of the first sequences, then of the next."""
        shards = []
        for sequences in even_slices(self.batch, self.batch_shards):
            for kv_heads in even_slices(self.kv_heads, self.head_shards):
                # kv heads 1:3, G = 2 -> query heads 2:6
                heads = slice(kv_heads.start * self.group, kv_heads.stop * self.group)
                shards.append(Shard(sequences, kv_heads, heads))
        return shards

    def join(self, parts: Sequence[Float[Array, "_ T _ H"]]) -> Float[Array, "B T _ H"]:
        """Joins an array of each shard along the heads, then along the sequences."""
        # Shards [a, b, c, d] in a 2 x 2 grid: heads a | b of the first sequences, c | d of the
        # rest.
        parts_per_row = len(even_slices(self.kv_heads, self.head_shards))
        rows = []
        for start in range(0, len(parts), parts_per_row):
            row = parts[start : start + parts_per_row]
            rows.append(jnp.concatenate(row, axis=2))
        return jnp.concatenate(rows)


def shard_grid(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> ShardGrid:
    """Returns the grid for a call: the batch is cut first, then the heads if shards are left."""
    batch, queries, heads, _ = q.shape
    _, keys, kv_heads, _ = k.shape

    scores = batch * heads * queries * keys
    wanted = min(MAX_SHARDS, scores // MIN_SHARD_SCORES)
    if jax.sharding.get_abstract_mesh().size > 1:
        # The partitioner of a mesh would gather what is cut here.
        wanted = 1

    batch_shards = len(even_slices(batch, wanted))
    return ShardGrid(
        batch=batch,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        batch_shards=batch_shards,
        head_shards=wanted // batch_shards,
    )


def even_slices(size: int, parts: int) -> list[slice]:
    """Returns slices of the same length, but the last, that cover `size`: at most `parts` of them.

    Args:
      size: what is cut, at least 1.
      parts: how many slices are wanted; below 1 is one.
    """
    parts = max(1, min(size, parts))
    length = math.ceil(size / parts)

    # 5 in 3 parts: slices of 2, 2 and 1.
    slices = []
    for start in range(0, size, length):
        stop = min(start + length, size)
        slices.append(slice(start, stop))
    return slices

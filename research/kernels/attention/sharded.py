"""Attention on each device's shard of the batch and the heads, for implementations that no
partitioner can cut.
"""

import functools
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.parallel.mesh_axes import BATCH_AXES, TENSOR_AXIS
from research.parallel.shard_map import shard_map, sharding_axes


def per_device(attention: Callable[..., Array]) -> Callable[..., Array]:
    """Returns `attention` wrapped in a `shard_map` over its rows of the batch and its heads."""

    @functools.wraps(attention)
    def call(
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: AttentionMask,
        terms: ScoreTerms,
    ) -> Float[Array, "B T N H"]:
        if jax.sharding.get_abstract_mesh().size <= 1:
            return attention(q, k, v, mask, terms)

        # Mesh axes, or None where they do not divide the size.
        batch = sharding_axes(BATCH_AXES, q.shape[0]) or None
        heads = sharding_axes((TENSOR_AXIS,), q.shape[2], k.shape[2]) or None

        def term_spec(term: Array) -> PartitionSpec:
            # A term [N] has heads only; a bias [B, 1, T, S] is not cut where it is broadcast.
            if term.ndim == 1:
                return PartitionSpec(heads)
            term_batch = batch if term.shape[0] > 1 else None
            term_heads = heads if term.shape[1] > 1 else None
            return PartitionSpec(term_batch, term_heads)

        tokens = PartitionSpec(batch, None, heads)
        mask_specs = jax.tree.map(lambda _: PartitionSpec(batch), mask)
        term_specs = jax.tree.map(term_spec, terms)
        sharded = shard_map(attention, (tokens, tokens, tokens, mask_specs, term_specs), tokens)
        return sharded(q, k, v, mask, terms)

    return call

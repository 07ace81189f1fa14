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
        batch = sharding_axes(BATCH_AXES, q.shape[0]) or None
        heads = sharding_axes((TENSOR_AXIS,), q.shape[2], k.shape[2]) or None
        tokens = PartitionSpec(batch, None, heads)

        def term_spec(term: Array) -> PartitionSpec:
            if term.ndim == 1:
                return PartitionSpec(heads)
            return PartitionSpec(
                batch if term.shape[0] > 1 else None, heads if term.shape[1] > 1 else None
            )

        specs = (jax.tree.map(lambda _: PartitionSpec(batch), mask), jax.tree.map(term_spec, terms))
        return shard_map(attention, (tokens, tokens, tokens, *specs), tokens)(q, k, v, mask, terms)

    return call

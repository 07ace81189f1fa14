"""Attention on each device's shard of the batch, the tokens and the heads, for what no partitioner
can cut.
"""

import functools
from collections.abc import Callable
from types import ModuleType

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from research.kernels.attention.key_exchange import KeyExchange, exchange_and_attend
from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.parallel.mesh_axes import CONTEXT_AXIS, TENSOR_AXIS
from research.parallel.shard_map import batch_axes, shard_map, sharding_axes


def context_axes(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"]) -> tuple[str, ...]:
    """Returns the mesh axis over which the tokens of a row are sharded, or none."""
    return sharding_axes((CONTEXT_AXIS,), q.shape[1], k.shape[1])


def head_axes(heads: int, kv_heads: int) -> tuple[str | None, str | None]:
    """Returns the mesh axis over which query heads are sharded, and that of key/value heads.

    All devices have a single key/value head, as weight absorption makes of all heads.
    """
    keys = sharding_axes((TENSOR_AXIS,), heads, kv_heads)
    if keys:
        return TENSOR_AXIS, TENSOR_AXIS
    if kv_heads == 1 and sharding_axes((TENSOR_AXIS,), heads):
        return TENSOR_AXIS, None
    return None, None


def per_device(implementation: ModuleType, exchange: KeyExchange) -> Callable[..., Array]:
    """Returns the attention of an implementation wrapped in a `shard_map` over its rows of the
    batch, its tokens and its heads.

    Args:
      implementation: a module with `attention`; where tokens are sharded, with its passes too.
      exchange: how queries meet the keys of other devices.
    """

    def call(
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: AttentionMask,
        terms: ScoreTerms,
    ) -> Float[Array, "B T N H"]:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.size <= 1:
            return implementation.attention(q, k, v, mask, terms)

        # Mesh axes, or None where they do not divide the size.
        batch = batch_axes(q.shape[0]) or None
        heads, kv_heads = head_axes(q.shape[2], k.shape[2])
        context = context_axes(q, k) or None
        attention = implementation.attention
        if context:
            (axis,) = context
            attention = functools.partial(
                exchange_and_attend, exchange, implementation, axis, mesh.shape[axis]
            )

        def mask_spec(array: Array) -> PartitionSpec:
            # A prefix [B] is a number per row; the others are [B, T] or [B, S].
            return PartitionSpec(batch) if array.ndim == 1 else PartitionSpec(batch, context)

        def term_spec(term: Array) -> PartitionSpec:
            # A term [N] has heads only; a bias [B, 1, T, S] is not cut where it is broadcast.
            if term.ndim == 1:
                return PartitionSpec(heads)
            term_batch = batch if term.shape[0] > 1 else None
            term_heads = heads if term.shape[1] > 1 else None
            term_rows = context if term.shape[2] > 1 else None
            return PartitionSpec(term_batch, term_heads, term_rows)

        queries = PartitionSpec(batch, context, heads)
        keys = PartitionSpec(batch, context, kv_heads)
        mask_specs = jax.tree.map(mask_spec, mask)
        term_specs = jax.tree.map(term_spec, terms)
        sharded = shard_map(attention, (queries, keys, keys, mask_specs, term_specs), queries)
        return sharded(q, k, v, mask, terms)

    return call

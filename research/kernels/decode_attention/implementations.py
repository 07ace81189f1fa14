"""Picks the implementation of decode attention: see `research.kernels.choice`."""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Literal

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from research.kernels import choice
from research.kernels.attention import ScoreTerms
from research.kernels.decode_attention import cpu, gpu, reference, tpu
from research.kernels.decode_attention.pages import KVPages
from research.parallel.mesh_axes import TENSOR_AXIS
from research.parallel.shard_map import batch_axes, shard_map, sharding_axes
from research.parallel.target import platform

Implementation = Literal["auto", "reference", "cpu", "tpu", "gpu"]
DecodeAttentionFn = Callable[..., Float[Array, "B T N H"]]

IMPLEMENTATIONS: dict[str, ModuleType] = {
    "reference": reference,
    "cpu": cpu,
    "tpu": tpu,
    "gpu": gpu,
}
PREFERRED = {"cpu": ("cpu",), "tpu": ("tpu",), "gpu": ("gpu",)}


def choose(
    implementation: Implementation,
    q: Float[Array, "B T N H"],
    pages: KVPages,
    window: int | None,
    terms: ScoreTerms,
) -> DecodeAttentionFn:
    """Returns the function to call.

    Raises:
      UserError: the implementation named, or the fast one of this platform, does not support the
        call.
    """
    name = choice.choose(
        "decode attention", implementation, IMPLEMENTATIONS, PREFERRED, q, pages, window, terms
    )
    function = IMPLEMENTATIONS[name].decode_attention
    return function if name == "reference" else per_device(function)


def is_supported(q: Float[Array, "B T N H"], pages: KVPages, window: int | None) -> bool:
    """Whether a fast implementation of this platform supports a call with plain scores."""
    modules = [IMPLEMENTATIONS[name] for name in PREFERRED[platform()]]
    terms = ScoreTerms()
    return any(module.unsupported_reason(q, pages, window, terms) is None for module in modules)


def per_device(decode_attention: DecodeAttentionFn) -> DecodeAttentionFn:
    """Returns `decode_attention` wrapped in a `shard_map` over its sequences and its heads.

    Page ids mean the same on every device, so each holds all pages, of its own heads.
    """

    @functools.wraps(decode_attention)
    def call(
        q: Float[Array, "B T N H"],
        pages: KVPages,
        table: Int[Array, "B pages_per_sequence"],
        lengths: Int[Array, "B"],
        window: int | None,
        terms: ScoreTerms,
    ) -> Float[Array, "B T N H"]:
        if jax.sharding.get_abstract_mesh().size <= 1:
            return decode_attention(q, pages, table, lengths, window, terms)
        batch = batch_axes(q.shape[0]) or None
        heads = sharding_axes((TENSOR_AXIS,), q.shape[2], pages.kv_heads) or None

        # q [B, T, N, H]; table and lengths [B, ...]; pages [pages, K, slots, H]; terms [N]
        by_head = PartitionSpec(batch, None, heads)
        by_sequence = PartitionSpec(batch)
        page_specs = jax.tree.map(lambda _: PartitionSpec(None, heads), pages)
        term_specs = jax.tree.map(lambda _: PartitionSpec(heads), terms)

        def on_shard(
            q: Array, pages: KVPages, table: Array, lengths: Array, terms: ScoreTerms
        ) -> Array:
            return decode_attention(q, pages, table, lengths, window, terms)

        in_specs = (by_head, page_specs, by_sequence, by_sequence, term_specs)
        mapped = shard_map(on_shard, in_specs, by_head)
        return mapped(q, pages, table, lengths, terms)

    return call

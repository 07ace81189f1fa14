"""Which body computes decode attention: see `research.kernels.choice` for what a body is."""

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
from research.parallel.mesh_axes import BATCH_AXES, TENSOR_AXIS
from research.parallel.shard_map import shard_map, sharding_axes

Implementation = Literal["auto", "reference", "cpu", "tpu", "gpu"]
Body = Callable[..., Float[Array, "B R N H"]]

BODIES: dict[str, ModuleType] = {"reference": reference, "cpu": cpu, "tpu": tpu, "gpu": gpu}
PREFERRED = {"cpu": ("cpu",), "tpu": ("tpu",), "gpu": ("gpu",)}


def choose(
    implementation: Implementation,
    q: Float[Array, "B R N H"],
    pages: KVPages,
    window: int | None,
    terms: ScoreTerms,
) -> Body:
    """Returns the body to call.

    Raises:
      UserError: the body named, or the fast body of this platform, refuses the call.
    """
    name = choice.choose(
        "decode attention", implementation, BODIES, PREFERRED, q, pages, window, terms
    )
    body = BODIES[name].decode_attention
    return body if name == "reference" else per_device(body)


def per_device(body: Body) -> Body:
    """Returns `body`, called once a device under a mesh, on its sequences and its heads.

    Page ids mean the same on every device, so each holds all pages, of its own heads.
    """

    @functools.wraps(body)
    def call(
        q: Float[Array, "B R N H"],
        pages: KVPages,
        table: Int[Array, "B pages_per_sequence"],
        lengths: Int[Array, "B"],
        window: int | None,
        terms: ScoreTerms,
    ) -> Float[Array, "B R N H"]:
        if jax.sharding.get_abstract_mesh().size <= 1:
            return body(q, pages, table, lengths, window, terms)
        batch = sharding_axes(BATCH_AXES, q.shape[0]) or None
        heads = sharding_axes((TENSOR_AXIS,), q.shape[2], pages.kv_heads) or None
        rows, sequences = PartitionSpec(batch, None, heads), PartitionSpec(batch)
        page_specs = jax.tree.map(lambda _: PartitionSpec(None, heads), pages)
        term_specs = jax.tree.map(lambda _: PartitionSpec(heads), terms)

        def share(
            q: Array, pages: KVPages, table: Array, lengths: Array, terms: ScoreTerms
        ) -> Array:
            return body(q, pages, table, lengths, window, terms)

        specs = (rows, page_specs, sequences, sequences, term_specs)
        return shard_map(share, specs, rows)(q, pages, table, lengths, terms)

    return call

"""The TPU compiler, too, gathers no page and no weight in a step of the engine, and copies none."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import pytest

from research.bench.engine_steps import CompiledRead, compile_read, on_device
from research.models.cache_rows import put_layer, slice_layer
from research.models.config import (
    AttentionConfig,
    ExpertsConfig,
    LatentConfig,
    LayerConfig,
    MlpConfig,
    ModelConfig,
)
from research.models.language_model import abstract_boxed_params
from research.models.paged_cache import PagedCache
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.recipes.generation_mesh import shardings_for_generation
from research.scaling.topology import tpu_devices
from tests.inference.compiled_read import largest_array_of_pages, moved, summed

pytestmark = pytest.mark.compilers

# A layer's pages are above the fast memory of a core, where a copy would be no temporary.
TOKENS = 2**20
# Rows of a step: newest tokens alone, and prompts beside them.
DECODE, MIXED = 8, 64
# Grouped queries.
DENSE = ModelConfig(
    vocab_size=1024,
    num_layers=2,
    embed_dim=256,
    max_length=512,
    attention=AttentionConfig(8, 4, 128),
    mlp=MlpConfig(hidden_dim=512),
    layer_loop="scan",
    dtype="bfloat16",
    param_dtype="bfloat16",
)
# Experts with a shared one; latents, as in DeepSeek-V3.
EXPERTS = dataclasses.replace(
    DENSE, experts=ExpertsConfig(8, 2, hidden_dim=256, shared_dim=256), vocab_size=2048
)
LATENT = dataclasses.replace(
    DENSE,
    attention=AttentionConfig(
        8, 8, 128, latent=LatentConfig(kv_dim=256, q_dim=128, rope_dim=64, value_dim=128)
    ),
)
# Two rounds of a pattern of layers with a window and without, in pages of their own.
WINDOWS = dataclasses.replace(DENSE, num_layers=4, pattern=(LayerConfig(window=128), LayerConfig()))
TENSOR = {"tensor": 4}
CASES = {
    "dense, v5e": (DENSE, "v5e:2x2", TENSOR),
    "dense, v5p": (DENSE, "v5p:2x2x1", TENSOR),
    "dense, v6e": (DENSE, "v6e:2x2", TENSOR),
    "windows, v5e": (WINDOWS, "v5e:2x2", TENSOR),
    "latents, v5e": (LATENT, "v5e:2x2", TENSOR),
    "experts, v5e": (EXPERTS, "v5e:2x4", {"expert": 4, "tensor": 2}),
}


def compiled(model: ModelConfig, topology: str, sizes: dict[str, int], rows: int) -> CompiledRead:
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}), tpu_devices(topology))
    boxed = abstract_boxed_params(model, "tpu")

    def place(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = jax.tree.map(place, nn.unbox(boxed), shardings_for_generation(boxed, mesh, 3))
    return compile_read(model, params, mesh, slots=8, tokens=TOKENS, tile=rows)


@pytest.mark.parametrize("rows", [DECODE, MIXED], ids=["decode", "mixed"])
@pytest.mark.parametrize(("model", "topology", "sizes"), CASES.values(), ids=CASES)
def test_a_step_sends_hidden_states_and_logits_alone(
    model: ModelConfig, topology: str, sizes: dict[str, int], rows: int
):
    found = compiled(model, topology, sizes, rows)
    hidden = rows * model.embed_dim
    assert moved(found) == {("all-gather", ("tensor",), rows * model.vocab_size)}
    sums = {(("tensor",), hidden)}
    if model.experts is not None:
        sums |= {(("expert", "tensor"), hidden)}
    assert summed(found) == sums

    # Keys and values are sharded by head; latents belong to all heads.
    shards = 1 if model.attention.latent else sizes["tensor"]
    parts = [math.prod(on_device(leaf)) for leaf in found.pages]
    assert parts == [leaf.size // shards for leaf in found.pages]
    assert largest_array_of_pages(found) == max(parts)
    assert found.temporaries < found.layer_bytes


def test_pages_that_are_scanned_over_are_found(monkeypatch):  # the control
    def copied(cache: PagedCache, index: jax.Array) -> PagedCache:
        return cache.replace(pages=slice_layer(cache.pages, index))

    def put(cache: PagedCache, index: jax.Array, layer: PagedCache) -> PagedCache:
        return cache.replace(pages=put_layer(cache.pages, index, layer.pages))

    monkeypatch.setattr(PagedCache, "layer", copied)
    monkeypatch.setattr(PagedCache, "put", put)
    found = compiled(DENSE, "v5e:2x2", TENSOR, DECODE)
    assert found.temporaries > found.layer_bytes

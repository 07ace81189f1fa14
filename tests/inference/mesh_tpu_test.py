"""The TPU compiler, too, gathers no cache and no weight in a decode step."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from research.inference.generate import DecodeState, decode_step
from research.inference.sampling_config import SamplingConfig, SamplingParams
from research.models.config import AttentionConfig, ExpertsConfig, MlpConfig, ModelConfig
from research.models.language_model import abstract_boxed_params, language_model
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.recipes.generation_mesh import shardings_for_generation
from research.scaling.collectives import collectives
from research.scaling.topology import tpu_devices

ROWS, SLOTS = 8, 256
# Grouped queries, and experts with a shared one.
MODEL = ModelConfig(
    vocab_size=1024,
    num_layers=2,
    embed_dim=256,
    max_length=512,
    attention=AttentionConfig(8, 4, 128),
    mlp=MlpConfig(hidden_dim=512),
    experts=ExpertsConfig(8, 2, hidden_dim=256, shared_dim=256),
    layer_loop="scan",
)


def decode_state(plain: Any) -> DecodeState:
    """What a decode step takes, before anything is in it."""
    cache = language_model(MODEL).empty_cache(plain, ROWS, SLOTS)
    keys = jax.random.split(jax.random.key(0), ROWS)
    zeros = jnp.zeros(ROWS, jnp.int32)
    seen = jnp.zeros((ROWS, MODEL.vocab_size), bool)
    sampling = SamplingParams.of([SamplingConfig()] * ROWS)
    return DecodeState(cache, zeros, zeros, keys, sampling, seen)


@pytest.mark.compilers
def test_decode_step_for_tpus_sends_hidden_states_and_logits_alone():
    mesh = make_mesh(MeshConfig(data=1, expert=4, tensor=2), tpu_devices("v5e:2x4"))
    boxed = abstract_boxed_params(MODEL, "tpu")
    plain = nn.unbox(boxed)
    leaves, tree = jax.tree.flatten(decode_state(plain))

    def place(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    # Stacked keys and values [L, B, S, K, H]; everything else has rows alone.
    by_head = NamedSharding(mesh, PartitionSpec(None, "expert", None, "tensor"))
    by_row = NamedSharding(mesh, PartitionSpec("expert"))
    placed = [place(leaf, by_head if leaf.ndim == 5 else by_row) for leaf in leaves]

    def step(params: Any, leaves: list[Any]) -> list[Any]:
        after = decode_step.__wrapped__(params, tree.unflatten(leaves), config=MODEL)
        return jax.tree.leaves(after)

    with jax.set_mesh(mesh):
        params = jax.tree.map(place, plain, shardings_for_generation(boxed, mesh, 3))
        compiled = jax.jit(step, donate_argnums=1).lower(params, placed).compile()

    found = collectives(compiled.as_text(), mesh)
    sizes = {
        (each.kind, each.axes, shape.size) for each in found if each.axes for shape in each.shapes
    }
    # Two rows on a device: their choices go to as many places as all devices may need, and back.
    local, width = ROWS // 4, MODEL.embed_dim
    assert {each for each in sizes if each[0] != "all-reduce"} == {
        ("all-gather", ("tensor",), local * MODEL.vocab_size),
        ("ragged-all-to-all", ("expert",), 4 * local * 2 * width),
        ("ragged-all-to-all", ("expert",), local * 2 * width),
    }
    assert {size for kind, axes, size in sizes if axes == ("tensor",) and kind == "all-reduce"} == {
        local * width
    }
    # How many choices each device sends to each expert, and by which rules rows are drawn.
    summed = {size for kind, axes, size in sizes if axes == ("expert",) and kind == "all-reduce"}
    assert summed == {4 * MODEL.experts.num_experts, 1}

    # Of keys and values a device has an eighth.
    caches = sum(leaf.size for leaf in leaves if leaf.ndim == 5)
    shards = [leaf.sharding.shard_shape(leaf.shape) for leaf in jax.tree.leaves(params)]
    others = sum(math.prod(shape) for shape in shards)
    # Four bytes each; what else is by row is small.
    floats = compiled.memory_analysis().argument_size_in_bytes / 4
    assert others + caches / 8 <= floats < 1.1 * (others + caches / 8)

"""The first batch tells a sound attention from one that leaks, before a step is taken with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.kernels.attention import cpu
from research.parallel.mesh import MeshConfig, make_mesh
from research.parallel.rules import batch_sharding
from research.training.self_check import check_attention
from tests.models.variants import VARIANTS, pack, rows
from tests.tiny import random_params, stack, tiny_config


def packed_batch(mesh, count=8, length=24):
    rng = np.random.default_rng(0)
    segments = np.repeat([[1, 2, 3, 0]], count, axis=0).repeat(length // 4, axis=1)
    tokens = rng.integers(0, 16, (count, length))
    positions = np.tile(np.arange(length // 4), (count, 4))
    batch = {"tokens": tokens, "targets": tokens, "positions": positions, "segments": segments}
    batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()} | {"weights": jnp.ones((count, length))}
    return jax.device_put(batch, batch_sharding(mesh))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2), jax.devices()[:2])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_sound_attention_passes(dtype, loop, mesh):
    config = tiny_config(dtype=dtype, layer_loop=loop)
    params = random_params(tiny_config())
    params = stack(params, config.num_layers) if loop == "scan" else params
    check_attention(config, params, packed_batch(mesh), mesh)


@pytest.mark.parametrize("name", ["windows", "shared experts", "latent", "encoder", "encoder-decoder", "prefix"])
def test_sound_attention_of_every_structure_passes(name):
    config = VARIANTS[name]
    one = make_mesh(MeshConfig(), jax.devices()[:1])
    batch = pack(rows(config, [9, 5, 7]))
    batch |= {"targets": batch["tokens"], "weights": jnp.ones(batch["tokens"].shape)}
    check_attention(config, jax.tree.map(jnp.asarray, random_params(config)), batch, one)


def without_segments(body):
    def leaking(q, k, v, mask, terms):
        return body(q, k, v, dataclasses.replace(mask, q_segments=None, kv_segments=None), terms)

    return leaking


def with_wrong_gradient(body):
    def wrong(q, k, v, mask, terms):
        return body(q, k, v + 0.05 * (v - jax.lax.stop_gradient(v)), mask, terms)

    return wrong


# Five percent of a gradient are within what bfloat16 may do.
@pytest.mark.parametrize(
    ("fault", "dtype", "where"),
    [
        (without_segments, "float32", "the "),
        (without_segments, "bfloat16", "the "),
        (with_wrong_gradient, "float32", "the gradient of value"),
    ],
)
def test_attention_that_is_wrong_stops_the_run(monkeypatch, fault, where, dtype, mesh):
    config, params = tiny_config(dtype=dtype), random_params(tiny_config())
    monkeypatch.setattr(cpu, "attention", fault(cpu.attention))
    with pytest.raises(UserError, match=rf"attention.implementation = 'auto' drifts .*: {where}"):
        check_attention(config, params, packed_batch(mesh), mesh)
    plain = dataclasses.replace(config, attention=dataclasses.replace(config.attention, implementation="reference"))
    check_attention(plain, params, packed_batch(mesh), mesh)

"""The first batch tells a sound attention from one that leaks, before a step is taken with it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.kernels.attention import cpu
from research.models.config import ExpertsConfig, LayerConfig
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
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
    batch = {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()} | {
        "weights": jnp.ones((count, length))
    }
    return jax.device_put(batch, batch_sharding(mesh))


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(MeshConfig(data=2), jax.devices()[:2])


@pytest.mark.fast_cases("scan-float32", "unroll-bfloat16")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("loop", ["unroll", "scan"])
def test_sound_attention_passes(dtype, loop, mesh):
    config = tiny_config(dtype=dtype, layer_loop=loop)
    params = random_params(tiny_config())
    params = stack(params, config.num_layers) if loop == "scan" else params
    check_attention(config, params, packed_batch(mesh), mesh)


@pytest.mark.fast_cases("windows", "encoder-decoder")
@pytest.mark.parametrize(
    "name", ["windows", "shared experts", "latent", "encoder", "encoder-decoder", "prefix"]
)
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
        (with_wrong_gradient, "float32", "the gradient of layers_0/attention/value"),
    ],
)
def test_attention_that_is_wrong_stops_the_run(monkeypatch, fault, where, dtype, mesh):
    config, params = tiny_config(dtype=dtype), random_params(tiny_config())
    monkeypatch.setattr(cpu, "attention", fault(cpu.attention))
    with pytest.raises(UserError, match=rf"attention.implementation = 'auto' drifts .*: {where}"):
        check_attention(config, params, packed_batch(mesh), mesh)
    plain = dataclasses.replace(
        config, attention=dataclasses.replace(config.attention, implementation="reference")
    )
    check_attention(plain, params, packed_batch(mesh), mesh)


def encoder_decoder(**changes):
    config = dataclasses.replace(VARIANTS["encoder-decoder"], **changes)
    batch = pack(rows(config, [9, 5, 7]))
    batch |= {"targets": batch["tokens"], "weights": jnp.ones(batch["tokens"].shape)}
    return config, random_params(config), batch


@pytest.mark.fast_cases("True")
@pytest.mark.parametrize("across", [True, False])
def test_a_wrong_gradient_in_one_attention_of_an_encoder_decoder_stops_the_run(monkeypatch, across):
    config, params, batch = encoder_decoder()
    sound, wrong = cpu.attention, with_wrong_gradient(cpu.attention)

    def attention(q, k, v, mask, terms):
        return (wrong if not mask.causal and (q.shape[1] != k.shape[1]) == across else sound)(
            q, k, v, mask, terms
        )

    monkeypatch.setattr(cpu, "attention", attention)
    with pytest.raises(
        UserError, match="the gradient of encoder/" if not across else "the gradient of "
    ):
        check_attention(config, params, batch, make_mesh(MeshConfig(), jax.devices()[:1]))


@pytest.mark.parametrize(("layers", "encoder_layers"), [(2, 1), (1, 2)])
def test_first_layers_may_fill_a_stack_of_an_encoder_decoder(layers, encoder_layers):
    config, params, batch = encoder_decoder(
        num_layers=layers,
        encoder_layers=encoder_layers,
        first_layers=(LayerConfig(experts=False),),
        experts=ExpertsConfig(num_experts=4, experts_per_token=2, hidden_dim=8),
    )
    check_attention(config, params, batch, make_mesh(MeshConfig(), jax.devices()[:1]))

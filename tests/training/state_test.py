"""The state of step 0 is the same on every mesh, and no two of its arrays share a buffer."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.trees import named_leaves
from research.models.initialization import init_params
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.training.state import TrainState, abstract_state, create_state, new_state
from tests.tiny import tiny_config

INIT = functools.partial(init_params, tiny_config(num_layers=1))


def created(
    mesh: MeshConfig, devices: list[jax.Device] | None = None
) -> tuple[TrainState, TrainState]:
    optimizer = optax.adam(1e-3)
    abstract = abstract_state(
        jax.eval_shape(INIT, jax.random.key(0)), optimizer, make_mesh(mesh, devices), keep_ema=True
    )
    return create_state(INIT, optimizer, abstract, jax.random.key(3)), abstract


@pytest.fixture(scope="module")
def on_one() -> TrainState:
    return created(MeshConfig(), jax.devices()[:1])[0]


def test_mesh_changes_no_initial_value(on_one):
    state, abstract = created(MeshConfig(data=2, fsdp=2, tensor=2))
    expected, shapes = named_leaves(on_one), named_leaves(abstract)
    for name, leaf in named_leaves(state).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected[name]), err_msg=name)
        assert leaf.sharding == shapes[name].sharding
        assert (leaf.shape, leaf.dtype) == (shapes[name].shape, shapes[name].dtype)


def test_state_begins_with_initial_parameters_and_their_copy(on_one):
    jax.tree.map(np.testing.assert_array_equal, on_one.params, on_one.ema)
    assert np.std(on_one.params["embed"]["embedding"]) == pytest.approx(0.3, rel=0.1)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(on_one.opt_state))
    assert (int(on_one.step), int(on_one.skipped), int(on_one.skipped_in_row)) == (0, 0, 0)


def test_no_two_arrays_share_a_buffer():
    params = {"w": jnp.ones(3)}
    state = new_state(params, optax.adam(1e-3), keep_ema=True)
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(places)) == len(places)
    assert new_state(params, optax.adam(1e-3), keep_ema=False).ema is None

"""Layers have one form on disk: claims about `models.canonical_params`."""

import jax
import jax.numpy as jnp
import numpy as np

from research.core.trees import named_leaves
from research.models.canonical_params import canonical, stack_layers, unstack_layers
from tests.training.states import abstract, assert_same, new_state, on_mesh


def test_unrolled_and_scanned_states_have_the_same_canonical_form():
    unrolled, scanned = canonical(new_state(scanned=False)), canonical(new_state(scanned=True))
    assert set(unrolled) == set(scanned)
    assert "params/layers/mlp/kernel" in scanned
    assert "opt_state/0/mu/layers/scale" in scanned
    for name in scanned:
        assert unrolled[name].dtype == scanned[name].dtype
        np.testing.assert_array_equal(unrolled[name], scanned[name], err_msg=name)


def test_another_seed_has_another_canonical_form():
    one, other = canonical(new_state(0)), canonical(new_state(1))
    assert not np.array_equal(one["params/layers/mlp/kernel"], other["params/layers/mlp/kernel"])


def test_unstacking_inverts_stacking_on_a_mesh():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"))
    state = on_mesh(new_state(), mesh, ("tensor",))
    shapes = named_leaves(abstract(state))
    stacked = canonical(state)
    kernel = stacked["params/layers/mlp/kernel"]
    assert kernel.sharding.spec == jax.sharding.PartitionSpec(None, None, ("tensor",))
    back = unstack_layers(stacked, shapes)
    assert list(back) == list(shapes)
    assert_same(back, named_leaves(state))
    for name, array in back.items():
        assert array.sharding.is_equivalent_to(shapes[name].sharding, array.ndim), name


def test_shapes_stack_as_arrays_do():
    mesh = jax.make_mesh((8,), ("data",))
    state = on_mesh(new_state(), mesh, ("data",))
    arrays, shapes = canonical(state), canonical(abstract(state))
    assert set(arrays) == set(shapes)
    for name, shape in shapes.items():
        assert (shape.shape, shape.dtype) == (arrays[name].shape, arrays[name].dtype)
        assert shape.sharding.is_equivalent_to(arrays[name].sharding, shape.ndim)


def test_a_scanned_state_passes_through_without_a_copy():
    named = named_leaves(new_state(scanned=True))
    assert all(leaf is named[name] for name, leaf in stack_layers(named).items())


def test_what_only_some_layers_have_stays_as_it_is():
    named = {
        "decoder/layers_0/w": jnp.ones(2),
        "decoder/layers_1/w": jnp.ones(2),
        "decoder/layers_1/expert": jnp.ones(3),
        "decoder/layers_0/v": jnp.ones(4),
        "decoder/layers_1/v": jnp.ones(5),
    }
    stacked = stack_layers(named)
    assert {name: leaf.shape for name, leaf in stacked.items()} == {
        "decoder/layers_1/expert": (3,),
        "decoder/layers_0/v": (4,),
        "decoder/layers_1/v": (5,),
        "decoder/layers/w": (2, 2),
    }
    assert_same(
        unstack_layers(stacked, {name: abstract(leaf) for name, leaf in named.items()}), named
    )


def test_more_than_ten_layers_stay_in_order():
    named = {f"layers_{i}/w": jnp.full((1,), i) for i in range(12)}
    np.testing.assert_array_equal(stack_layers(named)["layers/w"][:, 0], np.arange(12))

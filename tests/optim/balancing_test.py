"""Biases of the choice of experts follow the load, each by its own."""

import jax.numpy as jnp
import numpy as np

from research.optim.balancing import balance_experts


def test_bias_moves_by_its_speed_towards_the_mean_load():
    params = {"layers": {"mlp": {"selection_bias": jnp.ones((2, 3)), "up": jnp.ones(4)}}}
    load = jnp.array([[5.0, 1.0, 0.0], [2.0, 2.0, 2.0]])
    moved = balance_experts(params, {"layers/mlp": load}, 0.25)
    np.testing.assert_array_equal(
        moved["layers"]["mlp"]["selection_bias"], [[0.75, 1.25, 1.25], [1.0, 1.0, 1.0]]
    )
    np.testing.assert_array_equal(moved["layers"]["mlp"]["up"], params["layers"]["mlp"]["up"])


def test_load_of_a_bias_that_is_not_trained_moves_nothing():
    params = {"layers_0": {"mlp": {"selection_bias": jnp.ones(3)}}}
    load = jnp.array([5.0, 1.0, 0.0])
    moved = balance_experts(params, {"layers_1/mlp": load}, 0.25)
    np.testing.assert_array_equal(moved["layers_0"]["mlp"]["selection_bias"], np.ones(3))

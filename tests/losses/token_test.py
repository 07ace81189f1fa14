"""Weighted sums over tokens."""

import jax
import jax.numpy as jnp
import numpy as np

from research.losses.token import weighted_sum, z_loss


def test_weighted_sum_is_the_sum_of_products():
    assert (
        weighted_sum(jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([[1.0, 0.5], [0.0, 2.0]]))
        == 10.0
    )


def test_token_of_weight_zero_counts_nothing_even_where_it_is_infinite():
    weights = jnp.array([1.0, 0.0, 0.0])
    value, gradient = jax.value_and_grad(weighted_sum)(jnp.array([2.0, jnp.inf, jnp.nan]), weights)
    assert value == 2.0
    np.testing.assert_array_equal(gradient, [1.0, 0.0, 0.0])
    # The control: with any weight it counts.
    assert not jnp.isfinite(
        weighted_sum(jnp.array([2.0, jnp.inf, 0.0]), jnp.array([1.0, 0.1, 0.0]))
    )


def test_half_precision_values_are_summed_in_float32():
    total = weighted_sum(jnp.ones(1000, jnp.bfloat16), jnp.ones(1000))
    assert total.dtype == jnp.float32
    assert total == 1000.0


def test_z_loss_is_the_square_of_the_normalizer():
    np.testing.assert_allclose(z_loss(jnp.array([-3.0, 0.0, 2.0]), 0.5), [4.5, 0.0, 2.0])

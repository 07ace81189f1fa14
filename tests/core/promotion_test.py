"""Optax may mix types and ranks where this project's code may not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.promotion import promoting


def add(left: jax.Array, right: jax.Array) -> jax.Array:
    return left + right


@pytest.mark.parametrize(
    ("left", "right"),
    [(jnp.ones(3, jnp.bfloat16), jnp.ones(3, jnp.float32)), (jnp.ones((2, 3)), jnp.ones(3))],
    ids=["types", "ranks"],
)
def test_mix_is_promoted_inside_alone(left: jax.Array, right: jax.Array):
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        found = promoting(add)(left, right)
        with pytest.raises(ValueError, match="promotion"):
            add(left, right)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, np.full(left.shape, 2.0))

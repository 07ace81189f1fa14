"""A wrong shape or type ends a call under pytest."""

import jax.numpy as jnp
import jaxtyping
import pytest

from research.core.trees import nested
from research.inference.serve_config import ServeConfig
from research.kernels.row_major import swap_last


def test_an_array_of_another_rank_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError, match="swap_last"):
        swap_last(jnp.zeros(3))


def test_a_value_of_another_type_is_refused():
    with pytest.raises(TypeError, match="separator"):
        nested({}, separator=1)


def test_a_field_of_another_type_is_refused():
    with pytest.raises(TypeError, match="slots"):
        ServeConfig(slots="two")

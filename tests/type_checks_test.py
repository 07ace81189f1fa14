"""A wrong shape or type ends a call under pytest."""

import dataclasses
from collections.abc import Callable

import beartype
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Array, Float

from research.core.trees import nested
from research.inference.serve_config import ServeConfig
from research.kernels.row_major import swap_last
from tests import type_checks

checked = type_checks.jaxtyped_where_needed(typechecker=beartype.beartype)


class Doubling:
    @checked
    def half(self, x: Float[Array, "rows"]) -> Float[Array, "half"]:
        return x[: x.shape[0] // 2]

    @checked
    def same(self, x: Float[Array, "rows"]) -> Float[Array, "rows"]:
        return x[1:]


@checked
@dataclasses.dataclass
class Row:
    values: Float[np.ndarray, "columns"]


@checked
def double(x: "Unknown") -> "Unknown":
    return 2 * x


@checked
def doubling() -> Callable[[Array], Array]:
    @checked
    def inner(x: Float[Array, "rows"]) -> Float[Array, "rows"]:
        return 2 * x

    return inner


def test_an_array_of_another_rank_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError, match="swap_last"):
        swap_last(jnp.zeros(3))
    with pytest.raises(jaxtyping.TypeCheckError, match="Row"):
        Row(np.zeros((2, 2)))
    with pytest.raises(jaxtyping.TypeCheckError, match="inner"):
        doubling()(jnp.zeros((2, 2)))
    with pytest.raises(jaxtyping.TypeCheckError, match="half"):
        Doubling().half(jnp.zeros((2, 2)))


def test_a_returned_array_of_another_shape_is_refused():
    assert Doubling().half(jnp.zeros(4)).shape == (2,)
    with pytest.raises(jaxtyping.TypeCheckError, match="return value"):
        Doubling().same(jnp.zeros(4))


def test_a_type_that_is_only_a_name_is_any():
    assert double(2) == 4


def test_a_value_of_another_type_is_refused():
    with pytest.raises(TypeError, match="separator"):
        nested({}, separator=1)


def test_a_field_of_another_type_is_refused():
    with pytest.raises(TypeError, match="slots"):
        ServeConfig(slots="two")

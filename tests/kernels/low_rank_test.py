"""Whoever multiplies with a weight takes base + a b in its place, and finds what the plain sum
gives.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from research.kernels.cross_entropy import cross_entropy
from research.kernels.grouped_matmul import grouped_matmul
from research.kernels.low_rank import LowRank
from research.kernels.projection import project
from research.kernels.weights import (
    append_row,
    as_array,
    as_product,
    einsum,
    split_axes,
    take_rows,
    transpose,
)

RANK = 2
SIZES = jnp.asarray([3, 0, 2])
IDS = jnp.asarray([[0, 3], [2, 2]])


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def low_rank(
    inputs: tuple[int, ...], outputs: tuple[int, ...], stacks: tuple[int, ...] = ()
) -> LowRank:
    base = normal(1, *stacks, *inputs, *outputs)
    return LowRank(base, normal(2, *stacks, *inputs, RANK), normal(3, *stacks, RANK, *outputs))


def losses(weight: Any, implementation: str = "chunked") -> tuple[jax.Array, jax.Array]:
    """Returns nll and log_z of six tokens."""
    hidden = normal(4, 2, 3, 5)
    targets = jnp.arange(6).reshape(2, 3)
    options = {"softcap": 3.0, "label_smoothing": 0.1, "implementation": implementation}
    return cross_entropy(
        lambda *losses: (losses[0].sum(), losses), hidden, weight, targets, **options
    )[1]


# name -> (what is computed from the weight, the weight)
OPERATIONS: dict[str, tuple[Callable[[Any], Any], LowRank]] = {
    "project": (lambda w: project(normal(4, 3, 5), w, normal(5, 2, 4)), low_rank((5,), (2, 4))),
    "project two axes": (lambda w: project(normal(4, 3, 2, 4), w, axes=2), low_rank((2, 4), (5,))),
    "grouped matmul": (
        lambda w: grouped_matmul(normal(4, 5, 6), w, SIZES),
        low_rank((6,), (4,), (3,)),
    ),
    "einsum": (
        lambda w: einsum("BTNH,CNH->BTNC", normal(4, 1, 3, 2, 4), w),
        low_rank((5,), (2, 4)),
    ),
    "einsum the other way": (
        lambda w: einsum("BTNC,CNV->BTNV", normal(4, 1, 3, 2, 5), w),
        low_rank((5,), (2, 4)),
    ),
    "rows of a table": (lambda w: take_rows(w, IDS), low_rank((6,), (5,))),
    "cross-entropy": (losses, low_rank((5,), (6,))),
    "tied cross-entropy": (lambda w: losses(transpose(w)), low_rank((6,), (5,))),
    "fused cross-entropy": (lambda w: losses(w, "fused"), low_rank((5,), (6,))),
    "one more row": (lambda w: as_array(append_row(w, normal(6, 4))), low_rank((5,), (4,))),
    "product": (lambda w: jnp.dot(*as_product(normal(4, 3, 5), w)), low_rank((5,), (4,))),
    "array": (as_array, low_rank((2, 4), (5,), (3,))),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_gives_what_the_plain_sum_gives(name: str):
    function, weight = OPERATIONS[name]
    stacks = weight.a.ndim + weight.b.ndim - 2 - weight.base.ndim
    axes = "xyz"[:stacks]
    rest = weight.a.ndim - 1 - stacks
    inputs, outputs = "ijk"[:rest], "uvw"[: weight.b.ndim - 1 - stacks]
    plain = weight.base + jnp.einsum(
        f"{axes}{inputs}r,{axes}r{outputs}->{axes}{inputs}{outputs}", weight.a, weight.b
    )
    found = jax.tree.leaves(jax.jit(function)(weight))
    expected = jax.tree.leaves(jax.jit(function)(plain))
    without = jax.tree.leaves(jax.jit(function)(weight.base))
    for one, other, base in zip(found, expected, without, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * np.abs(other).max())
        assert np.abs(base - other).max() > 0.1


def test_a_loop_over_layers_cuts_all_leaves():
    stacked = low_rank((5,), (5,), (3,))
    x = normal(4, 2, 5)
    layers: Any = stacked
    found = jax.lax.scan(lambda x, w: (project(x, w), None), x, layers)[0]
    expected = functools.reduce(jnp.dot, as_array(stacked), x)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_axes_of_the_leaves_follow_from_those_of_the_weight():
    weight = low_rank((6,), (4,), (3,))
    names = split_axes(weight, ("expert", "embed", "mlp"), "rank")
    assert (names.a, names.b) == (("expert", "embed", "rank"), ("expert", "rank", "mlp"))
    specs = split_axes(weight, PartitionSpec(None, "tensor"))
    assert (specs.base, specs.a) == (
        PartitionSpec(None, "tensor"),
        PartitionSpec(None, "tensor", None),
    )
    assert specs.b == PartitionSpec(None, None, None)
    assert split_axes(jnp.zeros(2), ("embed",)) == ("embed",)

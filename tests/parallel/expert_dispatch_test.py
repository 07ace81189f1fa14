"""Tokens meet the experts that they chose, wherever both are: against a plain loop over tokens."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from research.parallel.expert_dispatch import Dispatch, run_experts
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.parallel.row_exchange import plan_route, send_rows
from research.parallel.shard_map import shard_map

DEVICES, EXPERTS, TOKENS, CHOICES, WIDTH = 4, 8, 6, 2, 3
FACTORS = np.random.default_rng(0).normal(size=(EXPERTS, WIDTH)).astype(np.float32)


def draw(seed: int, uneven: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of all devices, their distinct experts, and the weights of the choices."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(DEVICES * TOKENS, WIDTH)).astype(np.float32)
    popularity = np.where(np.arange(EXPERTS) == 5, 8.0, 1.0 if uneven else 8.0)
    scores = rng.gumbel(size=(DEVICES * TOKENS, EXPERTS)) + np.log(popularity)
    chosen = np.argsort(-scores, axis=1)[:, :CHOICES].astype(np.int32)
    weights = rng.normal(size=chosen.shape).astype(np.float32)
    return x, chosen, weights


def plain(x: np.ndarray, chosen: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Expert e multiplies by its factors and adds e + 1; a choice of `EXPERTS` is none."""
    y = np.zeros_like(x)
    for token in range(len(x)):
        for expert, weight in zip(chosen[token], weights[token], strict=True):
            if expert < EXPERTS:
                y[token] += weight * (x[token] * FACTORS[expert] + expert + 1)
    return y


def apply_experts(factors, first, rows, group_sizes, expert_of_row):
    """The same of rows that are sorted; `first` is the first of this device's experts."""
    count = factors.shape[0]
    bounds = np.arange(1, rows.shape[0] + 1)[:, None] > jnp.cumsum(group_sizes)[None]
    np.testing.assert_equal(expert_of_row.shape, (rows.shape[0],))
    by_size = jnp.minimum(bounds.sum(axis=1), count - 1)
    add = (first + by_size + 1).astype(rows.dtype)
    return rows * factors[by_size] + add[:, None]


def run(
    dispatch: Dispatch, x: np.ndarray, chosen: np.ndarray, weights: np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """The outputs of all tokens, and how many choices were lost, on four devices of eight."""
    tokens = PartitionSpec("expert") if dispatch.tokens_sharded else PartitionSpec()

    def on_device(x, chosen, weights, factors):
        first = 0 if dispatch.axis is None else jax.lax.axis_index("expert") * factors.shape[0]
        apply = functools.partial(apply_experts, factors, first)
        y, lost = run_experts(dispatch, apply, x, chosen, weights)
        if dispatch.axis is not None and not dispatch.tokens_sharded:
            y = jax.lax.psum(y, "expert")
        return y, jax.lax.psum(lost, "expert")

    experts = PartitionSpec(dispatch.axis)
    mapped = shard_map(on_device, (tokens, tokens, tokens, experts), (tokens, PartitionSpec()))
    return mapped(x, chosen, weights, FACTORS)


@pytest.fixture(autouse=True)
def mesh() -> Iterator[None]:
    with jax.set_mesh(make_mesh(MeshConfig(data=1, expert=DEVICES, tensor=2))):
        yield


SHARDED = Dispatch(EXPERTS, "expert", DEVICES, tokens_sharded=True)
CASES = {
    "all experts here": Dispatch(EXPERTS),
    "exchanged": SHARDED,
    "same tokens everywhere": Dispatch(EXPERTS, "expert", DEVICES),
}


@pytest.mark.parametrize("name", CASES)
def test_each_token_gets_the_weighted_outputs_of_its_experts(name: str):
    for seed, uneven in ((0, False), (1, True)):
        x, chosen, weights = draw(seed, uneven)
        chosen[3, 1] = EXPERTS
        y, lost = run(CASES[name], x, chosen, weights)
        np.testing.assert_allclose(y, plain(x, chosen, weights), rtol=1e-5, atol=1e-5)
        assert lost == 0


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_one_device(name: str):
    x, chosen, weights = draw(2, uneven=True)
    g = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)

    def loss(dispatch: Dispatch, x, weights):
        y, _ = run(dispatch, x, chosen, weights)
        return jnp.sum(y * g)

    found = jax.grad(functools.partial(loss, CASES[name]), (0, 1))(x, weights)
    slopes = np.zeros_like(x)
    of_weights = np.zeros_like(weights)
    for token in range(len(x)):
        for rank, expert in enumerate(chosen[token]):
            slopes[token] += weights[token, rank] * FACTORS[expert] * g[token]
            output = x[token] * FACTORS[expert] + expert + 1
            of_weights[token, rank] = output @ g[token]
    np.testing.assert_allclose(found[0], slopes, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[1], of_weights, rtol=1e-4, atol=1e-5)


def test_choices_beyond_the_buffer_are_dropped_and_counted():
    x, chosen, weights = draw(3, uneven=True)
    dispatch = Dispatch(EXPERTS, "expert", DEVICES, tokens_sharded=True, buffer_factor=1.0)
    capacity = dispatch.buffer_rows(TOKENS, CHOICES)
    assert capacity == TOKENS * CHOICES
    # Each device of experts takes choices in the order of source devices, then of experts.
    kept = chosen.copy()
    lost = 0
    for target in range(DEVICES):
        taken = 0
        for source in range(DEVICES):
            mine = slice(source * TOKENS, (source + 1) * TOKENS)
            for expert in range(2 * target, 2 * target + 2):
                for token, rank in np.argwhere(chosen[mine] == expert):
                    if taken == capacity:
                        kept[mine][token, rank] = EXPERTS
                        lost += 1
                    else:
                        taken += 1
    y, found = run(dispatch, x, chosen, weights)
    assert lost > 0
    assert found == lost
    np.testing.assert_allclose(y, plain(x, kept, weights), rtol=1e-5, atol=1e-5)


def test_a_buffer_is_never_larger_than_what_may_come():
    assert SHARDED.buffer_rows(TOKENS, CHOICES) == DEVICES * TOKENS * 2
    one_expert = Dispatch(4, "expert", 4, tokens_sharded=True)
    assert one_expert.buffer_rows(TOKENS, CHOICES) == DEVICES * TOKENS
    generous = Dispatch(4, "expert", 4, tokens_sharded=True, buffer_factor=100.0)
    assert generous.buffer_rows(TOKENS, CHOICES) == DEVICES * TOKENS


def test_rows_arrive_in_the_order_of_their_sources_and_come_back():
    wanted = np.array([[2, 3, 1, 2], [8, 0, 0, 0], [1, 1, 1, 5], [0, 0, 8, 0]], np.int32)
    rows = np.arange(4 * 8 * 2, dtype=np.float32).reshape(32, 2) + 1
    for capacity in (32, 9):

        def there_and_back(rows, capacity=capacity):
            route = plan_route(jnp.asarray(wanted), capacity)
            arrived = send_rows(rows, route, "expert", capacity)
            return arrived, send_rows(arrived, route.reversed(), "expert", 8)

        sharded = PartitionSpec("expert")
        arrived, back = shard_map(there_and_back, (sharded,), (sharded, sharded))(rows)
        by_device = rows.reshape(4, 8, 2)
        offsets = np.cumsum(wanted, axis=1) - wanted
        for target in range(4):
            parts = []
            for source in range(4):
                start = offsets[source, target]
                parts.append(by_device[source, start : start + wanted[source, target]])
            expected = np.concatenate(parts)[:capacity]
            found = np.asarray(arrived).reshape(4, capacity, 2)[target]
            np.testing.assert_array_equal(found[: len(expected)], expected)
            assert (found[len(expected) :] == 0).all()
        lost = (np.asarray(back) == 0).all(axis=1).sum()
        # Target 0 is sent 11 rows, target 2 is sent 10.
        assert lost == (0 if capacity == 32 else 3)

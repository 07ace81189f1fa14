"""Rows of a table under a mesh: values and gradients are those of one device, and each device sums
its part of the width alone.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.parallel.row_gradients import take_rows
from research.parallel.rules import constrain, partition_spec
from research.parallel.shard_map import merge_rows, per_token
from research.scaling.collectives import collectives

ROWS, WIDTH = 24, 16
NAMES = ("vocab", "embed")
MESHES = {
    "fsdp-tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "context-expert": {"data": 1, "context": 2, "expert": 2, "tensor": 2},
    "fsdp": {"data": 1, "fsdp": 8},
}


def arrays() -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(ROWS, WIDTH)), jnp.float32)
    # Some ids come often: their gradients are sums.
    ids = jnp.asarray(rng.integers(0, ROWS // 2, (8, 6)), jnp.int32)
    weights = jnp.asarray(rng.normal(size=(8, 6, WIDTH)), jnp.float32)
    return table, ids, weights


def loss(table: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(take_rows(table, ids, NAMES)) * weights)


def plain_loss(table: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
    return jnp.sum(jnp.square(table[ids]) * weights)


@pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES)
def test_gradient_of_rows_is_that_of_one_device(sizes: dict[str, int]):
    table, ids, weights = arrays()
    with jax.set_mesh(make_mesh(MeshConfig(**sizes))):
        table_on_mesh = jax.device_put(table, partition_spec(NAMES))
        ids_on_mesh = jax.device_put(ids, partition_spec(("batch", "length")))
        value, gradient = jax.jit(jax.value_and_grad(loss))(table_on_mesh, ids_on_mesh, weights)
    expected, expected_gradient = jax.value_and_grad(plain_loss)(table, ids, weights)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(gradient, expected_gradient, atol=1e-5)
    assert np.abs(expected_gradient).max() > 1


def test_gradient_of_rows_is_scattered_over_the_width_before_it_is_summed_over_data():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    table, ids, weights = arrays()

    def moved(loss) -> set[tuple[str, tuple[str, ...], int]]:
        with jax.set_mesh(mesh):
            on_mesh = (
                jax.device_put(table, partition_spec(NAMES)),
                jax.device_put(ids, partition_spec(("batch", "length"))),
                jax.device_put(weights, partition_spec(("batch", "length", "embed"))),
            )
            gradient = jax.jit(
                lambda *arguments: constrain(jax.grad(loss)(*arguments), NAMES)
            ).lower(*on_mesh)
            found = collectives(gradient.compile().as_text(), mesh)
        return {(each.kind, each.axes, each.operand_bytes) for each in found if each.axes}

    part = ROWS // 2 * WIDTH * 4
    assert {("reduce-scatter", ("fsdp",), part), ("all-reduce", ("data",), part // 2)} < moved(loss)
    # The control: the partitioner sums all of the width over both axes.
    plain = moved(lambda table, *rest: plain_loss(constrain(table, ("vocab", None)), *rest))
    assert ("all-reduce", ("data", "fsdp"), part) in plain


def test_rows_are_merged_in_one_order_without_an_exchange():
    mesh = make_mesh(MeshConfig(data=2, context=4))
    x = jnp.arange(4 * 8 * 3).reshape(4, 8, 3)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, partition_spec(("batch", "length", "embed")))
        merged = jax.jit(lambda x: (merge_rows(x, 2), merge_rows(x[..., 0], 2)))
        text = merged.lower(x).compile().as_text()
        wide, narrow = merged(x)
        assert not collectives(text, mesh)
        # The control: XLA merges tokens of different devices by gathering them.
        plain = jax.jit(lambda x: x.reshape(-1, 3) * 2).lower(x).compile().as_text()
        assert collectives(plain, mesh)
    np.testing.assert_array_equal(wide[:, 0], narrow)
    assert sorted(np.asarray(narrow)) == sorted(np.asarray(x[..., 0]).ravel())
    # Without a mesh it is the plain order.
    one = jnp.asarray(np.asarray(x))
    np.testing.assert_array_equal(merge_rows(one, 2), one.reshape(-1, 3))


def test_choice_of_each_token_needs_no_other_device():
    mesh = make_mesh(MeshConfig(data=2, context=4))
    scores = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 6)), jnp.float32)

    def best(scores: jax.Array) -> jax.Array:
        return jax.lax.top_k(scores, 2)[1]

    with jax.set_mesh(mesh):
        on_mesh = jax.device_put(scores, partition_spec(("batch", "length", None)))
        chosen = jax.jit(lambda scores: per_token(best, scores)).lower(on_mesh).compile()
        assert not collectives(chosen.as_text(), mesh)
        np.testing.assert_array_equal(chosen(on_mesh), best(scores))
        assert collectives(jax.jit(best).lower(on_mesh).compile().as_text(), mesh)

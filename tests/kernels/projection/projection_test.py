"""Projections: one matrix product equals the contraction in place."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from research.kernels.projection import multiply_table, project
from research.parallel.target import compiling_for, platform

SHAPES = {1: ((4, 6, 16), (16, 2, 8), (2, 8)), 2: ((4, 6, 2, 8), (2, 8, 24), (24,))}


def inputs(axes, dtype):
    rng = np.random.default_rng(0)
    x, kernel, bias = SHAPES[axes]
    arrays = [
        jnp.asarray(rng.normal(size=shape), jnp.float32)
        for shape in (x, kernel, bias, (4, 6, *bias))
    ]
    return arrays[0].astype(dtype), arrays[1], arrays[2], arrays[3].astype(dtype)


def value_and_gradients(implementation, axes, x, kernel, bias, g):
    @jax.jit
    def run(x, kernel, bias):
        y, pull = jax.vjp(
            lambda *a: project(*a, axes=axes, implementation=implementation), x, kernel, bias
        )
        return (y, *pull(g))

    return run(x, kernel, bias)


@pytest.mark.default_passes
@pytest.mark.parametrize("axes", [1, 2])
def test_cpu_equals_reference_in_value_and_gradients(axes):
    args = inputs(axes, jnp.float32)
    expected = value_and_gradients("reference", axes, *args)
    for got, want in zip(value_and_gradients("cpu", axes, *args), expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("axes", [1, 2])
def test_reference_equals_its_equation_in_value_and_gradients(axes):
    x, kernel, bias, g = inputs(axes, jnp.float32)

    def affine(x, kernel, bias):
        return jnp.tensordot(x, kernel, axes) + jax.lax.broadcast_to_rank(bias, g.ndim)

    @jax.jit
    def plain(x, kernel, bias):
        y, pull = jax.vjp(affine, x, kernel, bias)
        return (y, *pull(g))

    expected = plain(x, kernel, bias)
    for got, want in zip(
        value_and_gradients("reference", axes, x, kernel, bias, g), expected, strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize("axes", [1, 2])
def test_bfloat16_rounds_activations_and_weight_gradients_never(axes, implementation):
    x, kernel, bias, g = inputs(axes, jnp.bfloat16)
    kernel, bias = (weight.astype(jnp.bfloat16).astype(jnp.float32) for weight in (kernel, bias))
    exact = value_and_gradients(
        "reference", axes, x.astype(jnp.float32), kernel, bias, g.astype(jnp.float32)
    )
    y, dx, dkernel, dbias = value_and_gradients(implementation, axes, x, kernel, bias, g)
    # The reference rounds the product too, before it adds the bias.
    product = y.astype(jnp.float32) - jax.lax.broadcast_to_rank(bias, y.ndim)
    slack = 2**-8 * np.abs(product).max() if implementation == "reference" else 1e-5
    for rounded, want, atol in ((y, exact[0], slack), (dx, exact[1], 1e-5)):
        assert rounded.dtype == jnp.bfloat16
        np.testing.assert_allclose(rounded.astype(jnp.float32), want, rtol=2**-8, atol=atol)
    for got, want in ((dkernel, exact[2]), (dbias, exact[3])):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_weight_gradients_of_a_plain_product_are_rounded():  # the control
    x, kernel, _, g = inputs(1, jnp.bfloat16)
    exact = np.tensordot(x.astype(jnp.float32), g.astype(jnp.float32), ((0, 1), (0, 1)))
    plain = jax.grad(
        lambda w: jnp.vdot(jnp.tensordot(x, w.astype(x.dtype), 1), g).astype(jnp.float32)
    )(kernel)
    assert np.abs(plain - exact).max() > 1e-3


def test_no_bias_is_no_bias():
    x, kernel, _, _ = inputs(1, jnp.float32)
    for implementation in ("reference", "cpu"):
        y = project(x, kernel, implementation=implementation)
        np.testing.assert_allclose(y, np.tensordot(x, kernel, 1), atol=1e-5)


def test_bfloat16_products_reach_the_library_as_they_are():
    x, kernel, bias = jnp.ones((256, 64), jnp.bfloat16), jnp.ones((64, 128)), jnp.ones(128)
    g = jnp.ones((256, 128), jnp.bfloat16)

    def run(x, kernel, bias):
        return jax.vjp(lambda *a: project(*a, implementation="cpu"), x, kernel, bias)[1](g)

    text = jax.jit(run).lower(x, kernel, bias).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("bf16" in line.split("->")[0] and "f32" in line.split("->")[1] for line in products)


def test_cpu_equals_reference_on_a_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x, kernel, bias, g = inputs(1, jnp.float32)
    expected = value_and_gradients("reference", 1, x, kernel, bias, g)
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
        kernel = jax.device_put(kernel, NamedSharding(mesh, PartitionSpec(None, "tensor")))
        got = value_and_gradients("cpu", 1, x, kernel, bias, g)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_another_platform_is_compiled_for_inside_only():
    before = platform()
    with compiling_for("tpu"):
        assert platform() == "tpu"
    assert platform() == before


@pytest.mark.default_passes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 16])
def test_logits_of_a_table_read_in_its_order_equal_the_contraction(rows, dtype):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(rows, 1, 24)), dtype)
    table = jnp.asarray(rng.normal(size=(50, 24)), dtype)
    expected = np.asarray(x, np.float64) @ np.asarray(table, np.float64).T
    for implementation in ("auto", "cpu", "reference"):
        found = jax.jit(multiply_table, static_argnums=2)(x, table, implementation)
        assert found.dtype == jnp.float32
        assert found.shape == (rows, 1, 50)
        np.testing.assert_allclose(found, expected, atol=2e-5)

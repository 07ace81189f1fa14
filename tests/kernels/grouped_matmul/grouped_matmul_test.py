"""The grouped matmul: every implementation equals plain NumPy, whatever the load of the experts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.kernels.grouped_matmul import cpu, grouped_matmul, reference, tpu, xla
from research.kernels.grouped_matmul.visits import visits
from research.parallel.target import compiling_for
from research.scaling.topology import TPU_TOPOLOGIES, compile_on, tpu_devices
from tests.tiers import rest_in

BLOCKS = tpu.BlockSizes(rows=16, inner=128, outer=128)
IMPLEMENTATIONS = {
    "reference": (reference.grouped_matmul, reference.outer_products),
    "cpu": (cpu.grouped_matmul, cpu.outer_products),
    "xla": (xla.grouped_matmul, xla.outer_products),
    "tpu": tuple(
        functools.partial(part, blocks=BLOCKS, interpret=True)
        for part in (tpu.grouped_matmul, tpu.outer_products)
    ),
}


def plain(x, kernels, sizes):
    y, start = np.zeros((len(x), kernels.shape[2]), np.float32), 0
    for kernel, size in zip(kernels, sizes, strict=True):
        y[start : start + size] = x[start : start + size] @ kernel
        start += size
    return y


def plain_outer(x, g, sizes):
    starts = np.cumsum(sizes) - sizes
    return np.stack([x[a : a + n].T @ g[a : a + n] for a, n in zip(starts, sizes, strict=True)])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    sizes=st.sampled_from(
        [[5, 0, 30, 5], [0, 0, 0, 0], [40, 0, 0, 0], [0, 0, 0, 33], [16, 16, 7, 1], [1, 1, 1, 1]]
    ),
    widths=st.sampled_from([(8, 12), (200, 140)]),
    seed=st.integers(0, 9),
)
def test_implementations_equal_numpy(implementation, sizes, widths, seed):
    rng, (width, features) = np.random.default_rng(seed), widths
    x, g = rng.normal(size=(40, width)), rng.normal(size=(40, features))
    # What stands past the last group is never looked at.
    x[sum(sizes) :] = g[sum(sizes) :] = np.nan
    x, g, kernels = (
        jnp.asarray(a, jnp.float32) for a in (x, g, rng.normal(size=(4, width, features)))
    )
    product, outer = IMPLEMENTATIONS[implementation]
    group_sizes = jnp.array(sizes)
    np.testing.assert_allclose(
        product(x, kernels, group_sizes), plain(*map(np.asarray, (x, kernels)), sizes), atol=1e-4
    )
    np.testing.assert_allclose(
        outer(x, g, group_sizes), plain_outer(*map(np.asarray, (x, g)), np.array(sizes)), atol=1e-4
    )


@pytest.mark.default_passes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_equation(dtype):
    rng = np.random.default_rng(0)
    x, g = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((600, 16), (600, 24)))
    kernels, sizes = (
        jnp.asarray(rng.normal(size=(3, 16, 24)), jnp.float32),
        jnp.array([300, 0, 290]),
    )

    def equation(x, kernels):
        # In float32, since some versions of XLA for CPU add up products of bfloat16 in bfloat16.
        rows, (x, kernels) = (
            reference.members(sizes, 600)[:, :, None],
            (a.astype(dtype) for a in (x, kernels)),
        )
        whole = (jnp.where(rows, x, 0).astype(jnp.float32), kernels.astype(jnp.float32))
        return jnp.einsum("emd,edf->mf", *whole).astype(dtype)

    results = []
    for call in (functools.partial(grouped_matmul, group_sizes=sizes), equation):
        y, pull = jax.vjp(call, x, kernels)
        results.append((y, *pull(g)))
    for got, want in zip(*results, strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(
            got.astype(np.float32),
            want.astype(np.float32),
            atol=1e-4 if dtype == "float32" else 0.2,
        )
    assert np.all(np.asarray(results[0][2])[1] == 0)
    # Summed in float32 from bfloat16 products, and not rounded to bfloat16.
    exact = plain_outer(np.float32(x), np.float32(g), np.array(sizes))
    np.testing.assert_allclose(results[0][2], exact, atol=1e-3)


def test_each_further_expert_costs_at_most_one_visit():
    def number(experts):
        return visits(jnp.zeros(experts, jnp.int32), 8192, 256, every_group=False).group.shape[0]

    assert number(4) == 8192 // 256 + 4
    assert number(64) == 8192 // 256 + 64


@pytest.mark.parametrize(
    "sizes", [[700, 0, 65, 601, 100], [1500, 0, 0, 0, 0], [0, 64, 0, 1000, 436]]
)
def test_blocks_for_cpu_hold_each_row_once_and_waste_less_than_the_smallest_a_group(sizes):
    def visit(block, carry):
        seen, computed = carry
        is_member = jnp.ones((block.size, 1), bool)
        if block.is_member is not None:
            is_member = block.is_member
        row = jax.lax.dynamic_slice_in_dim(seen, block.start, block.size)
        row = row + is_member.astype(jnp.int32) * (1 + block.group)
        return jax.lax.dynamic_update_slice_in_dim(
            seen, row, block.start, axis=0
        ), computed + block.size

    start = jnp.zeros((1500, 1), jnp.int32), 0
    seen, computed = jax.jit(lambda sizes: cpu._for_each_block(sizes, 1500, visit, start))(
        jnp.array(sizes)
    )
    owner = np.repeat(np.arange(1, 6), sizes)
    np.testing.assert_array_equal(seen[:, 0], np.pad(owner, (0, 1500 - len(owner))))
    assert computed - sum(sizes) < cpu.BLOCK_SIZES[-1] * np.count_nonzero(sizes)


def test_what_a_body_refuses_is_named():
    x, kernels, sizes = jnp.zeros((4, 8)), jnp.zeros((2, 8, 8)), jnp.array([2, 2])
    with pytest.raises(UserError, match="'tpu' does not support cpu: it needs a TPU"):
        grouped_matmul(x, kernels, sizes, implementation="tpu")
    with pytest.raises(UserError, match="'gpu' does not support cpu: it needs a GPU"):
        grouped_matmul(x, kernels, sizes, implementation="gpu")
    with (
        compiling_for("tpu"),
        pytest.raises(
            UserError, match="'tpu' does not support float16: it takes bfloat16 or float32"
        ),
    ):
        grouped_matmul(x.astype(jnp.float16), kernels, sizes)


def value_and_gradients(x, kernels, g, group_sizes):
    y, pull = jax.vjp(lambda x, kernels: grouped_matmul(x, kernels, group_sizes), x, kernels)
    return y, pull(g)


def arguments(rows, width, features, experts):
    shapes = (
        ("bfloat16", rows, width),
        ("float32", experts, width, features),
        ("bfloat16", rows, features),
    )
    return [jax.ShapeDtypeStruct(shape, dtype) for dtype, *shape in (*shapes, ("int32", experts))]


@pytest.mark.parametrize("generation", rest_in("compilers", TPU_TOPOLOGIES, "v5e"))
@pytest.mark.parametrize("sizes", [(2048, 1024, 2048, 8), (1000, 200, 300, 5)])
def test_kernels_are_compiled_for_every_generation(generation, sizes):
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    text = compile_on(tpu_devices(generation)[0], value_and_gradients, *arguments(*sizes)).as_text()
    assert "tessera_grouped_matmul" in text
    assert "tessera_grouped_outer_products" in text

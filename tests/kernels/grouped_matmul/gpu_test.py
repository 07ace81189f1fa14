"""The GPU implementation: Pallas kernels for Hopper against the reference in JAX's interpreter, and
compiled for an H200.
"""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.kernels import choice, grouped_matmul
from research.kernels.attention.gpu_plan import TILE
from research.kernels.grouped_matmul import gpu
from research.parallel.target import compiling_for
from research.scaling.topology import compile_on

H200 = "NVIDIA H200"
ROWS = 300


def value_and_gradients(x, kernels, g, group_sizes, implementation):
    call = functools.partial(grouped_matmul._grouped, group_sizes=group_sizes, name=implementation)
    y, pull = jax.vjp(call, x, kernels)
    return y, *pull(g)


run = jax.jit(value_and_gradients, static_argnames="implementation")


def operands(width, features, groups, dtype, seed):
    rng = np.random.default_rng(seed)
    shapes = (ROWS, width), (groups, width, features), (ROWS, features)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def expect(x, kernels, g, sizes):
    """Returns what the reference gives in float32 for the same numbers."""
    x, kernels, g = (a.astype(jnp.float32) for a in (x, kernels.astype(x.dtype), g))
    return run(x, kernels, g, jnp.array(sizes), implementation="reference")


def assert_equals_reference(x, kernels, g, sizes, tolerance):
    # What stands past the last group is never looked at.
    nowhere = jnp.arange(ROWS)[:, None] >= sum(sizes)
    spoiled = (jnp.where(nowhere, jnp.nan, a) for a in (x, g))
    found = run(next(spoiled), kernels, next(spoiled), jnp.array(sizes), implementation="gpu")
    for name, a, b in zip(
        ("y", "dx", "dkernels"), found, expect(x, kernels, g, sizes), strict=True
    ):
        np.testing.assert_allclose(
            np.float32(a), np.float32(b), atol=tolerance, rtol=tolerance, err_msg=name
        )
    return found


@st.composite
def group_sizes(draw, groups=4):
    """Sizes that together are at most the rows, some of them 0."""
    cuts = sorted(draw(st.lists(st.integers(0, ROWS), min_size=groups, max_size=groups)))
    sizes = np.diff([0, *cuts]).tolist()
    empty = draw(st.sets(st.integers(0, groups - 1), max_size=2))
    return [0 if group in empty else size for group, size in enumerate(sizes)]


@pytest.mark.thorough
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    sizes=group_sizes() | st.just([0, 0, 0, 0]) | st.just([128, 64, 0, 108]), seed=st.integers(0, 9)
)
def test_kernels_equal_the_reference_in_value_and_both_gradients(sizes, seed):
    assert_equals_reference(*operands(40, 24, 4, jnp.float16, seed), sizes, tolerance=2e-3)


@pytest.mark.thorough
def test_kernels_equal_the_reference_with_wide_tiles_and_a_group_over_several():
    x, kernels, g = operands(130, 500, 3, jnp.bfloat16, 0)
    plan, tiles_per_band, bands = gpu._plan(512, transposed=False)
    assert (plan.columns, tiles_per_band, bands) == (256, 2, 1)
    kernels, sizes = kernels.astype(jnp.float32), [3, 0, 270]
    y, _, dkernels = assert_equals_reference(x, kernels, g, sizes, tolerance=1e-2)
    assert dkernels.dtype == jnp.float32
    np.testing.assert_array_equal(y[sum(sizes) :], 0)
    np.testing.assert_array_equal(dkernels[1], 0)
    # The control: the tolerance is one that sizes shifted by one row do not keep.
    for a, b in zip(expect(x, kernels, g, sizes), expect(x, kernels, g, [4, 0, 269]), strict=True):
        assert np.abs(a - b).max() > 1


@settings(max_examples=30, deadline=None, derandomize=True)
@given(sizes=group_sizes())
def test_each_row_is_stored_once_by_its_group_or_as_zeros(sizes):
    rows = -(-ROWS // TILE) * TILE
    table = np.asarray(gpu.visit_table(jnp.array(sizes), rows, 7))
    assert len(table) == rows // TILE + len(sizes)
    owner = np.full(rows, -1)
    for group, tile, start, stop, steps in table:
        mine = slice(max(start, tile * TILE), min(stop, tile * TILE + TILE))
        assert steps in (0, 7)
        assert (owner[mine] == -1).all()
        owner[mine] = group if steps else len(sizes)
    np.testing.assert_array_equal(
        owner, np.repeat(range(len(sizes) + 1), [*sizes, rows - sum(sizes)])
    )


def compiled(device, implementation, rows, width, features, groups, dtype="bfloat16"):
    shapes = (
        (dtype, rows, width),
        ("float32", groups, width, features),
        (dtype, rows, features),
        ("int32", groups),
    )
    arguments = [jax.ShapeDtypeStruct(shape, kind) for kind, *shape in shapes]
    return compile_on(
        device, functools.partial(value_and_gradients, implementation=implementation), *arguments
    )


@pytest.mark.compilers
def test_kernels_compile_for_an_h200_at_odd_sizes(h200):
    assert compiled(h200, "gpu", 1000, 200, 300, 5, "float16").as_text().count("mosaic_gpu_v2") == 3


@pytest.mark.compilers
def test_temporaries_do_not_grow_with_the_groups(h200):
    rows, width, features, groups = 8192, 512, 512, 16
    programs = {
        implementation: compiled(h200, implementation, rows, width, features, groups)
        for implementation in ("gpu", "xla")
    }
    assert programs["gpu"].as_text().count("mosaic_gpu_v2") == 3
    temporaries = {
        implementation: program.memory_analysis().temp_size_in_bytes
        for implementation, program in programs.items()
    }
    # At most the kernels in the type of the rows, and the table of visits.
    assert temporaries["gpu"] < 1.01 * groups * width * features * 2
    # The control: all rows, once for each group.
    assert temporaries["xla"] > groups * rows * width * 2


REFUSED = [
    ({"platform": "cpu"}, "cpu: it needs a GPU"),
    ({"chip": "NVIDIA A100"}, "NVIDIA A100: it needs a Hopper GPU, such as an H200"),
    ({"chip": ""}, "a GPU that is not named: it needs a Hopper GPU"),
    ({"dtype": "float32"}, "float32: it takes bfloat16 or float16"),
    ({"width": 7}, None),
    ({"rows": 2**23, "width": 8}, "8388608 rows: it takes at most 8388224 on a device"),
]


@pytest.mark.parametrize(("given", "rule"), REFUSED)
def test_unsupported_reason_names_the_rule_and_the_nearest_value(given, rule):
    call = {"platform": "gpu", "chip": H200, "dtype": "bfloat16", "rows": 4, "width": 64} | given
    shapes = (call["rows"], call["width"]), (2, call["width"], 8)
    x, kernels = (jnp.zeros(shape, call["dtype"]) for shape in shapes)
    arguments = (x, kernels, jnp.array([2, 2]))
    with compiling_for(call["platform"], call["chip"]):
        if rule is None:
            assert gpu.unsupported_reason(x, kernels) is None
        else:
            with pytest.raises(UserError, match=rule):
                grouped_matmul.grouped_matmul(*arguments, implementation="gpu")


def test_auto_takes_xla_where_the_kernels_cannot_run_and_says_why_once(caplog):
    sizes = jnp.array([2, 2])
    choice._report.cache_clear()
    calls = [("NVIDIA H200", "bfloat16"), ("NVIDIA H200", "float32"), ("NVIDIA A100", "bfloat16")]
    with caplog.at_level(logging.INFO, logger="tessera"):
        for chip, dtype in calls * 2:
            x, kernels = jnp.zeros((4, 64), dtype), jnp.zeros((2, 64, 64), dtype)
            with compiling_for("gpu", chip):
                jax.eval_shape(lambda x, k: grouped_matmul.grouped_matmul(x, k, sizes), x, kernels)
    assert [record.getMessage() for record in caplog.records] == [
        "grouped matmul on gpu: gpu",
        "grouped matmul on gpu: xla (gpu does not support float32: it takes bfloat16 or float16)",
        "grouped matmul on gpu: xla (gpu does not support NVIDIA A100: it needs a Hopper GPU, such "
        "as an H200)",
    ]

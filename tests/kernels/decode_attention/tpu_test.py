"""The TPU kernel of decode attention: equal to the reference in interpret mode, compiled for every
generation.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from jax.experimental.pallas import tpu as pltpu

from research.core.errors import UserError
from research.kernels.attention import ScoreTerms
from research.kernels.decode_attention import decode_attention, empty_pages, reference, tpu
from research.kernels.decode_attention.pages import page_range
from research.parallel.target import compiling_for
from research.scaling.topology import TPU_TOPOLOGIES, compile_on, tpu_devices
from tests.kernels.decode_attention.cases import cache, calls, poisoned
from tests.tiers import rest_in

TYPES = ["float32", "bfloat16", "int8", "float8_e4m3fn"]


def interpreted(q, pages, table, lengths, window, terms, **changed):
    """Returns what the kernel gives where memory that nobody wrote is NaN."""
    with compiling_for("tpu", "TPU v5p"):
        plan = tpu.plan_for(q, pages, table.shape[1], window, terms)
    plan = dataclasses.replace(plan, **changed)
    interpret = pltpu.InterpretParams(uninitialized_memory="nan")
    call = lambda *arrays: tpu.paged_attention(*arrays, terms, plan, interpret)  # noqa: E731
    return jax.jit(call)(q, pages, table, lengths)


@pytest.mark.thorough
@settings(max_examples=8, deadline=None, derandomize=True)
@given(call=calls([128], [128], TYPES))
def test_kernel_equals_the_reference(call):
    (q, pages, table, lengths, window, terms), _ = call
    found = interpreted(
        q, poisoned(pages, table, lengths), table, lengths, window, terms, block_pages=2
    )
    # Matmuls of bfloat16 pages take float32 queries here, as the reference does.
    np.testing.assert_allclose(found, reference.decode_attention(*call[0]), atol=2e-5)


@pytest.mark.thorough
def test_bfloat16_queries_are_as_near_to_float32_as_their_type_allows():
    rng, lengths = np.random.default_rng(0), [300, 77]
    pages, table, _ = cache(rng, lengths, 4, 128, 2, 128, "int8")
    q = jnp.asarray(rng.normal(size=(2, 2, 8, 128)), jnp.float32)
    rest = pages, table, jnp.array(lengths), None, ScoreTerms(scale=0.1)
    exact = reference.decode_attention(q, *rest)
    found = interpreted(q.astype(jnp.bfloat16), *rest)
    assert found.dtype == jnp.bfloat16
    assert jnp.abs(found.astype(jnp.float32) - exact).max() < 0.01 * jnp.abs(exact).max()


def test_pages_before_the_window_are_never_read():
    rng, lengths = np.random.default_rng(0), jnp.array([130, 600])
    pages, table, _ = cache(rng, lengths, 5, 128, 1, 128)
    q, terms = jnp.asarray(rng.normal(size=(2, 1, 2, 128)), jnp.float32), ScoreTerms(scale=0.1)
    first, _ = page_range(lengths, 1, 128, 150)
    assert first.tolist() == [0, 3]
    spoiled = poisoned(pages, table, lengths, first)
    found = interpreted(q, spoiled, table, lengths, 150, terms)
    np.testing.assert_array_equal(found, interpreted(q, pages, table, lengths, 150, terms))
    # The control: without the window those pages are read.
    assert jnp.isnan(interpreted(q, spoiled, table, lengths, None, terms)).any()


@pytest.mark.parametrize("chip", rest_in("compilers", TPU_TOPOLOGIES, "v5e"))
def test_every_generation_compiles_it_and_copies_no_pages(chip):
    try:
        device = tpu_devices(chip)[0]
    except UserError as error:
        pytest.skip(str(error))
    shape = jax.ShapeDtypeStruct
    for dtype, rows, heads, kv_heads, options in (
        ("bfloat16", 1, 32, 8, {}),
        ("float32", 2, 8, 8, {"softcap": 20.0}),
        ("int8", 4, 16, 8, {"window": 1000}),
        ("float8_e4m3fn", 1, 16, 1, {"window": 100, "softcap": 20.0}),
    ):
        pages = jax.eval_shape(functools.partial(empty_pages, 512, 128, kv_heads, 128, dtype))
        q = shape((8, rows, heads, 64), jnp.float32 if dtype == "float32" else jnp.bfloat16)
        ints, floats = (
            (shape((8, 64), jnp.int32), shape((8,), jnp.int32)),
            [shape((heads,), jnp.float32)] * 2,
        )

        def call(q, pages, table, lengths, sinks, alibi, options=options):
            return decode_attention(q, pages, table, lengths, sinks=sinks, alibi=alibi, **options)

        compiled = compile_on(device, call, q, pages, *ints, *floats)
        assert (
            compiled.memory_analysis().temp_size_in_bytes
            < pages.key.size * pages.key.dtype.itemsize / 50
        )
        assert "tessera_decode_attention" in compiled.as_text()


@pytest.mark.parametrize(
    ("page_size", "kv_heads", "width", "dtype", "rule"),
    [
        (128, 2, 64, "bfloat16", "pages of head_dim = 64: it takes multiples of 128, such as 128"),
        (12, 2, 128, "bfloat16", "page_size = 12 in bfloat16: it takes multiples of 8, such as 16"),
        (4096, 2, 128, "bfloat16", "page_size = 4096 .* such as 2048"),
        (64, 2, 128, "int8", "page_size = 64 in int8: it takes multiples of 128, such as 128"),
        (128, 3, 128, "int8", "num_kv_heads = 3 in int8: it takes 1, 2, 4 or multiples of 8, as 4"),
        (128, 2, 128, "float16", "pages in float16: it takes them in bfloat16 or float32"),
    ],
)
def test_unsupported_reason_names_the_nearest_value(page_size, kv_heads, width, dtype, rule):
    pages = jax.eval_shape(lambda: empty_pages(2, page_size, kv_heads, width, dtype))
    q = jax.ShapeDtypeStruct((1, 1, kv_heads, width), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    with compiling_for("tpu", "TPU v5p"), pytest.raises(UserError, match=rule):
        jax.eval_shape(decode_attention, q, pages, *table)


def test_too_many_query_rows_are_refused():
    pages = jax.eval_shape(lambda: empty_pages(2, 128, 1, 128))
    q = jax.ShapeDtypeStruct((1, 65, 4, 128), jnp.bfloat16)
    table = jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.int32)
    with (
        compiling_for("tpu", "TPU v5p"),
        pytest.raises(UserError, match=r"260 query rows .* at most 256"),
    ):
        jax.eval_shape(decode_attention, q, pages, *table)

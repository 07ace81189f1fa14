"""The GPU implementation: Pallas kernels for Hopper against the reference in JAX's interpreter, and
compiled for an H200.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.kernels.attention import ScoreTerms
from research.kernels.decode_attention import empty_pages, gather, gpu, implementations, reference
from research.kernels.decode_attention.gpu_kernel import STEP
from research.kernels.decode_attention.pages import page_range
from research.parallel.target import compiling_for
from research.scaling.topology import compile_on
from tests.kernels.decode_attention.cases import cache, calls, poisoned

H200 = "NVIDIA H200"


def run(q, pages, table, lengths, window, terms):
    return np.float32(
        jax.jit(lambda *arrays: gpu.decode_attention(*arrays, window, terms))(
            q, pages, table, lengths
        )
    )


def expect(q, *rest):
    return np.float32(
        jax.jit(lambda q: reference.decode_attention(q, *rest))(q.astype(jnp.float32))
    )


@pytest.mark.thorough
@settings(max_examples=3, deadline=None, derandomize=True)
@given(
    call=calls([16, 64], [64], ["bfloat16", "float16"])
    | calls([32, 128], [64], ["int8", "float8_e4m3fn"])
)
def test_kernels_equal_the_reference(call):
    (q, pages, table, lengths, window, terms), _ = call
    q = q.astype(jnp.float16 if pages.quantized else pages.key.dtype)
    spoiled = poisoned(
        pages, table, lengths, page_range(lengths, q.shape[1], pages.page_size, window)[0]
    )
    found = run(q, spoiled, table, lengths, window, terms)
    # Weights are rounded to the type of the matmul.
    tolerance = 2e-2 if q.dtype == jnp.bfloat16 else 3e-3
    np.testing.assert_allclose(
        found, expect(q, pages, table, lengths, window, terms), atol=tolerance
    )


@pytest.mark.fast_cases("bfloat16")
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_kernels_equal_the_reference_with_everything_at_once(dtype, monkeypatch):
    # Rows of two tiles, splits that are combined one after the other, and slots that no sequence
    # filled, at the ends and before the window.
    monkeypatch.setattr(gpu, "COMBINED", 8)
    rng, lengths, rows, heads, window = np.random.default_rng(0), jnp.array([0, 2, 300]), 3, 24, 260
    pages, table, _ = cache(rng, lengths, 10, 32, 1, 64, dtype)
    q = jnp.asarray(rng.normal(size=(3, rows, heads, 64)), jnp.bfloat16)
    sinks, alibi = (jnp.asarray(rng.random(heads), jnp.float32) for _ in range(2))
    terms = ScoreTerms(sinks=sinks, alibi=alibi * 0.01, softcap=5.0, scale=0.2)
    plan = gpu.plan_for(q, pages, table.shape[1], window, terms)
    assert (plan.tiles, plan.height, plan.together) == (2, 40, 1)
    spoiled = poisoned(pages, table, lengths, page_range(lengths, rows, 32, window)[0])
    assert np.isnan(np.float32(gather(spoiled, table)[1])).any()
    found = run(q, spoiled, table, lengths, window, terms)
    np.testing.assert_array_equal(found[0], 0)
    np.testing.assert_array_equal(found[1, 0], 0)
    np.testing.assert_allclose(found, expect(q, pages, table, lengths, window, terms), atol=1e-2)
    # The control: the tolerance is one that a window of a page less does not keep.
    other = expect(q, pages, table, lengths, window - 32, terms)
    assert np.abs(found - other).max() > 2e-2


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 40 * STEP), min_size=1, max_size=6),
    target=st.integers(1, 30),
    window=st.sampled_from([None, 1, 200]),
)
def test_splits_hold_each_step_of_each_sequence_once(lengths, target, window):
    lengths = jnp.array(lengths)
    starts = page_range(lengths, 1, 16, window)[0] * 16
    splits, ranges = (np.asarray(x) for x in gpu.split_sequences(lengths, starts, 40, target))
    assert len(splits) <= len(lengths) + target
    assert ranges[-1, 1] <= len(splits)
    for row, (first, end) in enumerate(ranges):
        token = int(starts[row])
        for split in splits[first:end]:
            assert tuple(split[[0, 1, 3]]) == (row, token, lengths[row])
            assert split[2] > 0
            token += int(split[2]) * STEP
        assert lengths[row] <= token < lengths[row] + STEP
    np.testing.assert_array_equal(splits[ranges[-1, 1] :, 2], 0)
    # No split has more than an even part, but for the least size.
    assert splits[:, 2].max() <= max(gpu.LEAST_SPLIT, -(-splits[:, 2].sum() // target))


def compiled(
    device,
    dtype,
    page_size,
    heads,
    width,
    *,
    window=None,
    terms=None,
    rows=1,
    batch=4,
    places=16,
    count=64,
):
    pages = jax.eval_shape(lambda: empty_pages(count, page_size, heads[1], width, dtype))
    q = jax.ShapeDtypeStruct(
        (batch, rows, heads[0], width), "float16" if dtype == "float16" else "bfloat16"
    )
    table, lengths = (
        jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((batch, places), (batch,))
    )
    terms = ScoreTerms(scale=0.1) if terms is None else terms
    return compile_on(
        device, lambda *call: gpu.decode_attention(*call, window, terms), q, pages, table, lengths
    ), pages


FULL = ScoreTerms(sinks=jnp.ones(16), alibi=jnp.ones(16), softcap=30.0, scale=0.1)


@pytest.mark.compilers
@pytest.mark.parametrize(
    ("dtype", "page_size", "heads", "width", "options"),
    [
        ("bfloat16", 16, (16, 2), 128, {}),
        ("bfloat16", 192, (16, 2), 64, {"window": 100, "terms": FULL, "rows": 3}),
        ("float16", 8, (71, 1), 256, {}),
        ("int8", 32, (16, 16), 128, {"window": 100, "terms": FULL, "rows": 5}),
        ("int8", 64, (71, 1), 256, {}),
        ("float8_e4m3fn", 64, (16, 2), 192, {}),
    ],
)
def test_kernels_compile_for_an_h200(h200, dtype, page_size, heads, width, options):
    program, _ = compiled(h200, dtype, page_size, heads, width, **options)
    assert program.as_text().count("mosaic_gpu_v2") == 2


@pytest.mark.compilers
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_temporaries_hold_no_pages(h200, dtype):
    """A second of pages of long sequences, of which the sums of the splits are a small part."""
    program, pages = compiled(h200, dtype, 64, (32, 8), 128, batch=64, places=128, count=64 * 128)
    stored = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pages))
    memory = program.memory_analysis()
    assert memory.argument_size_in_bytes > stored
    assert memory.temp_size_in_bytes < stored / 100


REFUSED = [
    ({"platform": "cpu"}, "cpu: it needs a GPU"),
    ({"chip": "NVIDIA A100"}, "it needs a Hopper GPU, such as an H200"),
    ({"queries": "float32"}, "queries in float32: it takes bfloat16 or float16"),
    (
        {"dtype": "float16"},
        "pages in float16: it takes the queries' bfloat16, int8 or float8_e4m3fn",
    ),
    ({"width": 80}, "head_dim = 80: it takes multiples of 64 up to 256, such as 128"),
    ({"width": 320}, "such as 256"),
    (
        {"page_size": 24},
        "page_size = 24 in bfloat16: it takes 8, 16, 32 or multiples of 64, such as 32",
    ),
    ({"page_size": 100}, "such as 128"),
    (
        {"page_size": 16, "dtype": "int8"},
        "page_size = 16 in int8: it takes 32 or multiples of 64, such as 32",
    ),
    ({"page_size": 192}, None),
    ({"page_size": 32, "dtype": "float8_e4m3fn", "width": 256}, None),
]


@pytest.mark.parametrize(("given", "rule"), REFUSED)
def test_unsupported_reason_names_the_rule_and_the_nearest_value(given, rule):
    usual = {
        "queries": "bfloat16",
        "dtype": "bfloat16",
        "page_size": 16,
        "width": 64,
        "chip": H200,
        "platform": "gpu",
    }
    call = usual | given
    q = jnp.zeros((1, 1, 4, call["width"]), call["queries"])
    pages = empty_pages(2, call["page_size"], 2, call["width"], call["dtype"])
    with compiling_for(call["platform"], call["chip"]):
        if rule is None:
            implementations.choose("auto", q, pages, None, ScoreTerms())
        else:
            with pytest.raises(UserError, match=rule):
                implementations.choose("gpu", q, pages, None, ScoreTerms())

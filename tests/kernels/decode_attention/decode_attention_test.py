"""Decode attention: pages hold what was written, and the plain implementations give what the words
of the API say.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.kernels.attention import ScoreTerms
from research.kernels.decode_attention import (
    cpu,
    decode_attention,
    empty_pages,
    gather,
    in_bits,
    quantize,
    reference,
    stored,
    write,
)
from research.kernels.decode_attention.pages import KVPages, page_range
from research.parallel.target import compiling_for
from tests.kernels.decode_attention.cases import by_words, cache, calls, poisoned

IMPLEMENTATIONS = {"reference": reference.decode_attention, "cpu": cpu.decode_attention}
TYPES = ["float32", "bfloat16", "float16", "int8", "float8_e4m3fn"]


def run(function, q, pages, table, lengths, window, terms):
    return jax.jit(lambda *arrays: function(*arrays, window, terms))(q, pages, table, lengths)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(call=calls([4, 16], [8], ["float32"]))
def test_reference_equals_numpy_loops(call):
    (q, pages, table, lengths, window, terms), tokens = call
    expected = by_words(q, *tokens, lengths, window, terms)
    np.testing.assert_allclose(
        reference.decode_attention(q, pages, table, lengths, window, terms), expected, atol=1e-5
    )


@settings(max_examples=20, deadline=None, derandomize=True)
@given(call=calls([4, 16, 200], [8], TYPES))
def test_cpu_equals_the_reference(call):
    arguments, _ = call
    expected = reference.decode_attention(*arguments)
    np.testing.assert_allclose(run(cpu.decode_attention, *arguments), expected, atol=2e-5)


def test_a_mean_of_the_pages_is_told_from_attention():
    """The control: the tolerance of the comparisons sees a wrong weight."""
    rng = np.random.default_rng(0)
    pages, table, (_, v) = cache(rng, [9], 3, 4, 1, 8)
    q = jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32)
    out = decode_attention(q, pages, table, jnp.array([9]))
    assert np.abs(np.asarray(v[:, :9].mean(axis=1)) - out[:, 0]).max() > 0.01


@functools.cache
def _alone(kv_heads, dtype, window, chunk=cpu.CHUNK):
    """Sequences of many lengths in pages, and what each attends to where it is the only one."""
    rng = np.random.default_rng(0)
    lengths = [1, 15, 16, 33, 40, 64, 70, 100, 128, 150, 163, 0]
    pages, table, _ = cache(rng, lengths, 11, 16, kv_heads, 32, dtype)
    q = jnp.asarray(rng.normal(size=(len(lengths), 1, 4, 32)), jnp.float32)
    if dtype == "bfloat16":
        q = q.astype(dtype)
    terms = ScoreTerms(scale=0.3)

    @jax.jit
    def attend(q, table, lengths):
        return cpu.decode_attention(q, pages, table, lengths, window, terms)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "CHUNK", chunk)
        rows = [slice(row, row + 1) for row in range(len(lengths))]
        lengths = jnp.array(lengths)
        alone = [np.asarray(attend(q[row], table[row], lengths[row])) for row in rows]
    return attend, (q, table, lengths), np.concatenate(alone)


@pytest.mark.fast_cases("4-float32-None-8", "4-bfloat16-None-16", "1-float32-40-2", "1-int8-None-8")
@pytest.mark.parametrize("batch", [2, 8, 16])
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kv_heads", [4, 1])
def test_cpu_computes_a_sequence_alike_bit_for_bit_among_any_others(kv_heads, dtype, window, batch):
    attend, arrays, alone = _alone(kv_heads, dtype, window)
    rng = np.random.default_rng(batch)
    for _ in range(3):
        rows = rng.integers(0, len(alone), batch)
        mixed = np.asarray(attend(*(array[rows] for array in arrays)))
        assert mixed.tobytes() == alone[rows].tobytes()


def test_another_chunk_gives_other_bits():
    """The control: the comparison of bits sees in which order the keys of a sequence are added."""
    _, _, alone = _alone(4, "float32", None)
    _, _, other = _alone(4, "float32", None, chunk=32)
    np.testing.assert_allclose(other, alone, atol=1e-5)
    assert other.tobytes() != alone.tobytes()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "int8", "float8_e4m3fn"])
def test_slots_that_no_sequence_filled_do_not_matter(implementation, dtype):
    rng, lengths = np.random.default_rng(0), [0, 3, 8, 11]
    pages, table, _ = cache(rng, lengths, 3, 4, 2, 8, dtype)
    q = jnp.asarray(rng.normal(size=(4, 2, 4, 8)), jnp.float32)
    call = functools.partial(
        decode_attention, q, table=table, lengths=jnp.array(lengths), implementation=implementation
    )
    spoiled = poisoned(pages, table, lengths)
    np.testing.assert_array_equal(call(spoiled), call(pages))
    np.testing.assert_array_equal(call(pages)[0], 0)
    if dtype == "float32":
        assert jnp.isnan(gather(spoiled, table)[0]).any()


@pytest.mark.parametrize("rows", [1, 3])
def test_cpu_reads_no_page_before_the_window(rows):
    rng, lengths = np.random.default_rng(0), jnp.array([3, 9, 17])
    pages, table, _ = cache(rng, lengths, 5, 4, 1, 8)
    q = jnp.asarray(rng.normal(size=(3, rows, 1, 8)), jnp.float32)
    first, end = page_range(lengths, rows, 4, 6)
    assert (first <= end).all()
    call = functools.partial(
        decode_attention, q, table=table, lengths=lengths, window=6, implementation="cpu"
    )
    spoiled = poisoned(pages, table, lengths, first)
    np.testing.assert_array_equal(call(spoiled), call(pages))
    # The control: without the window those pages are read.
    assert jnp.isnan(decode_attention(q, spoiled, table, lengths, implementation="cpu")).any()


@pytest.mark.parametrize(
    ("window", "first"), [(None, [0, 0, 0]), (1, [0, 0, 3]), (5, [0, 0, 2]), (6, [0, 0, 1])]
)
def test_page_range_pages_are_those_of_the_window(window, first):
    found = page_range(jnp.array([0, 4, 14]), 2, 4, window)
    np.testing.assert_array_equal(found, [first, [0, 1, 4]])


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=2, max_size=2),
    new=st.sampled_from([1, 3]),
    dtype=st.sampled_from(TYPES),
    seed=st.integers(0, 100),
)
def test_written_tokens_are_found_after_those_before_them(lengths, new, dtype, seed):
    rng = np.random.default_rng(seed)
    pages, table, _ = cache(rng, [24, 24], 6, 4, 2, 8, dtype)
    before = gather(pages, table)
    added = [jnp.asarray(rng.normal(size=(2, new, 2, 8)), jnp.float32) for _ in range(2)]
    after = gather(jax.jit(write)(pages, table, jnp.array(lengths), *added), table)
    for old, tokens, found in zip(before, added, after, strict=True):
        if dtype in ("int8", "float8_e4m3fn"):
            numbers, scale = quantize(tokens, dtype)
            tokens = numbers.astype(jnp.float32) * scale[..., None]
        expected = np.array(old)
        for row, length in enumerate(lengths):
            expected[row, length : length + new] = tokens[row].astype(old.dtype)
        np.testing.assert_allclose(
            found.astype(jnp.float32), expected.astype(np.float32), rtol=1e-6
        )


def test_tokens_past_the_table_or_without_a_page_are_written_nowhere():
    ones = jnp.ones((3, 2, 1, 4))
    table, lengths = jnp.array([[0, 1], [2, -1], [7, 3]]), jnp.array([7, 3, 0])
    pages = write(empty_pages(5, 4, 1, 4, "float32"), table, lengths, ones, ones)
    written = np.asarray(pages.key).sum(axis=(1, 3)) / 4
    expected = np.zeros((5, 4))
    expected[1, 3] = expected[2, 3] = 1
    np.testing.assert_array_equal(written, expected)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantized_numbers_are_within_their_bound(dtype):
    rng = np.random.default_rng(0)
    x = (
        jnp.asarray(rng.normal(size=(50, 64)) * np.exp(rng.normal(size=(50, 1)) * 5), jnp.float32)
        .at[0]
        .set(0)
    )
    numbers, scale = quantize(x, dtype)
    error = jnp.abs(numbers.astype(jnp.float32) * scale[:, None] - x)
    bound = (
        scale[:, None] / 2
        if dtype == "int8"
        else jnp.maximum(jnp.abs(x) / 16, scale[:, None] / 1024)
    )
    assert (error <= bound * (1 + 1e-5)).all()
    assert (error > bound / 3).any(), "the bound is not a loose one"


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_attention_over_quantized_pages_is_within_the_bound_of_its_numbers(dtype):
    rng, lengths = np.random.default_rng(0), [40, 17]
    q = jnp.asarray(rng.normal(size=(2, 1, 4, 32)), jnp.float32)
    narrow, table, (k, v) = cache(rng, lengths, 10, 4, 2, 32, dtype)
    lengths = jnp.array(lengths)
    plain, _, _ = cache(np.random.default_rng(0), [40, 17], 10, 4, 2, 32)
    plain = write(plain, table, 0 * lengths, k[:, :40], v[:, :40])
    error = jnp.abs(
        decode_attention(q, narrow, table, lengths) - decode_attention(q, plain, table, lengths)
    ).max()
    # A score is off by at most ε, so weights by e^2ε, and the values by δ.
    relative = 1 / 254 if dtype == "int8" else 1 / 16
    score = float(jnp.abs(q).sum(-1).max() * jnp.abs(k).max() * relative / np.sqrt(32))
    value = float(jnp.abs(v).max())
    assert 0 < error <= value * (np.expm1(2 * score) + relative)
    if dtype == "int8":
        assert error < 0.02 * value


def test_mistakes_are_named_with_their_rule():
    q, pages = jnp.zeros((1, 1, 4, 8)), empty_pages(2, 4, 2, 8, "float32")
    rest = jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32)
    for changed, options, rule in (
        (q[:, :, :3], {}, "num_kv_heads = 2 does not divide num_heads = 3"),
        (
            jnp.pad(q, ((0, 0),) * 3 + ((0, 1),)),
            {},
            "head_dim = 9 of the queries is above that of the pages, 8",
        ),
        (q, {"window": 0}, "window = 0 must be at least 1"),
        (q, {"softcap": 0.0}, "softcap = 0.0 must be above 0"),
        (
            q,
            {"implementation": "tpu"},
            "'tpu' does not support .* take implementation = 'reference' by name",
        ),
    ):
        with pytest.raises(UserError, match=rule):
            decode_attention(changed, pages, *rest, **options)
    with pytest.raises(UserError, match="dtype = 'int4' is not one of bfloat16"):
        empty_pages(1, 4, 1, 8, "int4")


def test_implementations_run_in_a_shard_map_under_a_mesh(monkeypatch):
    rng, lengths = np.random.default_rng(0), jnp.array([0, 5, 12, 9])
    pages, table, _ = cache(rng, lengths, 3, 4, 2, 8, "int8")
    q = jnp.asarray(rng.normal(size=(4, 2, 4, 8)), jnp.float32)
    sinks = jnp.asarray(rng.normal(size=4), jnp.float32)
    expected = decode_attention(q, pages, table, lengths, sinks=sinks, implementation="reference")
    calls = []
    original = cpu.decode_attention
    monkeypatch.setattr(
        cpu, "decode_attention", lambda q, *rest: calls.append(q.shape) or original(q, *rest)
    )
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda *a: decode_attention(*a, sinks=sinks))(q, pages, table, lengths)
    assert calls[0] == (2, 2, 2, 8)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_pages_are_a_tree_of_their_arrays():
    pages = empty_pages(2, 4, 1, 8, "int8")
    assert len(jax.tree.leaves(pages)) == 4
    assert len(jax.tree.leaves(empty_pages(2, 4, 1, 8))) == 2
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), pages)
    assert isinstance(stacked, KVPages)
    with compiling_for("cpu"):
        shapes = jax.eval_shape(lambda p: p, stacked)
    assert shapes.key.shape == (2, 2, 1, 4, 8)


def temporaries(pages: KVPages) -> int:
    """Bytes of the temporaries of a compiled step that writes a token a row and reads all pages."""
    table, q = jnp.zeros((4, 64), jnp.int32), jnp.zeros((4, 1, 4, 64), jnp.float32)
    lengths = jnp.zeros(4, jnp.int32)

    def step(pages, q, table, lengths):
        pages = write(pages, table, lengths, q[:, :, :2], q[:, :, :2])
        terms = ScoreTerms(scale=0.1)
        return pages, cpu.decode_attention(q, pages, table, lengths + 1, None, terms)

    compiled = jax.jit(step, donate_argnums=0).lower(pages, q, table, lengths).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("dtype", TYPES)
def test_no_compiled_temporary_is_as_large_as_the_pages(dtype):
    """The pages are written and read where they lie, also those of a type that the CPU widens."""
    pages = stored(empty_pages(2048, 16, 2, 64, dtype))
    assert temporaries(pages) < pages.key.nbytes / 4


def test_xla_for_cpu_copies_pages_of_a_type_that_it_widens():
    """The control: why pages of bfloat16 and float8 are kept as bits."""
    pages = empty_pages(2048, 16, 2, 64, "bfloat16")
    assert temporaries(pages) > pages.key.nbytes


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn"])
def test_bits_of_numbers_are_the_numbers(dtype):
    rng, lengths = np.random.default_rng(0), jnp.array([5, 0, 40])
    pages, table, _ = cache(rng, lengths, 4, 16, 2, 8, dtype)
    bits = in_bits(pages)
    assert bits.key.dtype != pages.key.dtype == bits.dtype
    new = jnp.asarray(rng.normal(size=(3, 1, 2, 8)), jnp.float32)
    pages, bits = (write(each, table, lengths, new, new) for each in (pages, bits))
    for found, expected in zip(gather(bits, table), gather(pages, table), strict=True):
        np.testing.assert_array_equal(found, expected)
    q = jnp.asarray(rng.normal(size=(3, 1, 4, 8)), jnp.float32)
    for implementation in IMPLEMENTATIONS:
        found, expected = (
            decode_attention(q, each, table, lengths + 1, implementation=implementation)
            for each in (bits, pages)
        )
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("dtype", TYPES)
def test_the_stored_bytes_of_a_token_depend_on_the_token_alone(dtype):
    """So chunks of a prompt, shared pages and preemption change nothing."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.normal(size=(3, 20, 2, 8)), jnp.float32)
    empty = stored(empty_pages(6, 16, 2, 8, dtype))
    table, start = jnp.arange(6).reshape(3, 2), jnp.zeros(3, jnp.int32)
    put = jax.jit(write)
    at_once = put(empty, table, start, tokens, 2 * tokens)
    in_parts = empty
    # Row by row, and of each row 7 tokens, 1, then 12.
    for row in (2, 0, 1):
        for first, end in ((0, 7), (7, 8), (8, 20)):
            part = tokens[row : row + 1, first:end]
            its_table = table[row : row + 1]
            in_parts = put(in_parts, its_table, jnp.array([first]), part, 2 * part)
    for one, other in zip(at_once.arrays(), in_parts.arrays(), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    other_neighbour = put(empty, table, start, tokens.at[1].multiply(3), 2 * tokens)
    assert np.asarray(other_neighbour.key)[1:2].tobytes() == np.asarray(at_once.key)[1:2].tobytes()
    changed = np.asarray(other_neighbour.key)[2:4] != np.asarray(at_once.key)[2:4]
    # A scale takes up the factor, where there is one: int8 and float8 numbers stay.
    assert changed.any() == (dtype not in ("int8", "float8_e4m3fn"))


@pytest.mark.parametrize(
    ("dtype", "token_bytes"),
    [("float32", 64), ("bfloat16", 32), ("int8", 24), ("float8_e4m3fn", 24)],
)
def test_pages_take_the_bytes_of_their_format(dtype, token_bytes):
    """Of 8 keys and 8 values of a head: their own bytes, and two scales of 4 bytes."""
    pages = stored(empty_pages(3, 16, 2, 8, dtype))
    assert sum(array.nbytes for array in pages.arrays()) == 3 * 16 * 2 * token_bytes

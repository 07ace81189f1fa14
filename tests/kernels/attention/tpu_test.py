"""The TPU kernels: equal to the reference in interpret mode, compiled for every generation, linear
in memory.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.kernels.attention import AttentionMask, ScoreTerms, attention, reference, tpu
from research.kernels.attention.tpu import tiled_attention
from research.kernels.attention.tpu_plan import BlockSizes, plan_tiles, tile_visibility
from research.parallel.target import compiling_for
from research.scaling.topology import TPU_TOPOLOGIES, compile_on, tpu_devices
from tests.tiers import rest_in

SMALL = BlockSizes(queries=128, keys=128, resident=256)
TRANSPOSED = dataclasses.replace(SMALL, transposed=True)


def array(rng, *shape, dtype=jnp.float32):
    return jnp.asarray(rng.normal(size=shape), dtype)


def packed(rng, batch, length):
    """Documents after each other, then padding."""
    ids = 1 + np.cumsum(rng.random((batch, length)) < 0.02, axis=1)
    return jnp.asarray(
        np.where(np.arange(length) < length - rng.integers(0, 30, (batch, 1)), ids, 0)
    )


def both_sides(q, k, v, g, mask, terms, blocks=(SMALL, SMALL)):
    """Returns value and gradients, by the tiles and by the reference, as lists."""
    sides = []
    for function in (
        lambda q, k, v, terms: tiled_attention(q, k, v, mask, terms, blocks, True),
        lambda q, k, v, terms: reference.attention(q, k, v, mask, terms),
    ):

        @jax.jit
        def both(q, k, v, terms, function=function):
            out, pull = jax.vjp(function, q, k, v, terms)
            return jax.tree.leaves((out, pull(g)))

        sides.append(both(q, k, v, terms))
    return zip(*sides, strict=True)


def close(got, want, tolerance=1e-5):
    np.testing.assert_allclose(got, want, atol=tolerance * max(1.0, float(jnp.abs(want).max())))


@pytest.mark.thorough
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    lengths=st.sampled_from([(300, 300), (130, 400), (400, 129), (1, 200), (256, 256)]),
    heads=st.sampled_from([(2, 2), (4, 2), (3, 1)]),
    width=st.sampled_from([32, 80, 192]),
    causal=st.booleans(),
    window=st.sampled_from([None, 2, 100]),
    extra=st.sampled_from(["none", "prefix", "segments", "positions"]),
    given_terms=st.sets(st.sampled_from(["softcap", "sinks", "alibi"])),
    bias=st.sampled_from([None, (0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 1, 0), (1, 0, 0, 1)]),
    forward=st.sampled_from([SMALL, TRANSPOSED, dataclasses.replace(TRANSPOSED, queries=256)]),
    seed=st.integers(0, 100),
)
def test_value_and_every_gradient_equal_the_reference(
    lengths, heads, width, causal, window, extra, given_terms, bias, forward, seed
):
    rng, (queries, keys), (n, k_heads) = np.random.default_rng(seed), lengths, heads
    operands = {}
    if extra == "prefix":
        operands["prefix"] = jnp.array([5, 180])
    elif extra == "segments":
        ids = packed(rng, 2, max(queries, keys))
        operands |= {"q_segments": ids[:, :queries], "kv_segments": ids[:, :keys]}
    elif extra == "positions":
        operands["q_positions"] = (
            jnp.asarray(rng.permuted(np.tile(np.arange(queries), (2, 1)), axis=1)) + 20
        )
        operands["kv_positions"] = jnp.asarray(
            rng.permuted(np.tile(np.arange(keys), (2, 1)), axis=1)
        )
    mask = AttentionMask(causal=causal, window=window, **operands)
    terms = {"scale": 0.2, "softcap": 3.0 if "softcap" in given_terms else None}
    terms |= {name: jnp.abs(array(rng, n)) for name in given_terms - {"softcap"}}
    if bias is not None:
        whole = (2, n, queries, keys)
        terms["bias"] = array(
            rng, *(1 if one else size for one, size in zip(bias, whole, strict=True))
        )
    q, g = (array(rng, 2, queries, n, width) for _ in range(2))
    k, v = (array(rng, 2, keys, k_heads, width) for _ in range(2))
    for got, want in both_sides(q, k, v, g, mask, ScoreTerms(**terms), (forward, SMALL)):
        close(got, want)


@pytest.mark.thorough
@pytest.mark.parametrize("width", [32, 192])
@pytest.mark.parametrize("forward", [SMALL, TRANSPOSED])
def test_queries_that_attend_to_themselves_alone_give_no_gradient(width: int, forward):
    rng, mask = np.random.default_rng(0), AttentionMask(causal=True, window=1)
    q, k, v, g = (array(rng, 2, 300, 2, width) for _ in range(4))
    sides = both_sides(q, k, v, g, mask, ScoreTerms(scale=0.2), (forward, SMALL))
    (out, _), (dq, _), (dk, _), (dv, _) = sides
    np.testing.assert_array_equal(out, v)
    np.testing.assert_array_equal(dv, g)
    # Gradients of the scores are the difference of two equal sums: what is left is their rounding.
    rounding = np.finfo(np.float32).eps * float(jnp.abs(jnp.sum(g * v, axis=-1)).max())
    for gradient, other in ((dq, k), (dk, q)):
        most = 4 * rounding * 0.2 * float(jnp.abs(other).max())
        assert float(jnp.abs(gradient).max()) <= most


@pytest.mark.thorough
def test_bfloat16_is_as_near_to_float32_as_the_reference():
    rng, mask, terms = np.random.default_rng(0), AttentionMask(causal=True), ScoreTerms(scale=0.2)
    exact = [array(rng, 1, 300, 2, 64) for _ in range(4)]
    truth = [want for _, want in both_sides(*exact, mask, terms)]
    rounded = both_sides(*(x.astype(jnp.bfloat16) for x in exact), mask, terms)
    for (got, plain), true in zip(rounded, truth, strict=True):
        assert got.dtype == jnp.bfloat16
        error, plain_error = (
            jnp.abs(x.astype(jnp.float32) - true).max() / jnp.abs(true).max() for x in (got, plain)
        )
        assert error < max(2 * plain_error, 0.01)


def test_forgotten_segments_are_seen_by_the_comparison():
    rng = np.random.default_rng(0)
    ids = packed(rng, 2, 300)
    mask = AttentionMask(causal=True, q_segments=ids, kv_segments=ids)
    q, k, v = (array(rng, 2, 300, 2, 32) for _ in range(3))
    terms = ScoreTerms(scale=0.2)
    leaking = tiled_attention(q, k, v, AttentionMask(causal=True), terms, (SMALL, SMALL), True)
    with pytest.raises(AssertionError):
        close(leaking, reference.attention(q, k, v, mask, terms))


@pytest.mark.fast_cases("100-forward0", "None-forward1")
@pytest.mark.parametrize("forward", [SMALL, TRANSPOSED])
@pytest.mark.parametrize("window", [None, 100])
def test_tiles_that_the_mask_rules_out_are_never_read(window, forward):
    blocks = forward, SMALL
    rng = np.random.default_rng(0)
    q, k, v, g = (array(rng, 1, 512, 1, 32) for _ in range(4))
    mask = AttentionMask(causal=True, window=window)
    first = slice(0, 128)
    out, pull = jax.vjp(
        lambda q: tiled_attention(q, k, v, mask, ScoreTerms(scale=0.2), blocks, True)[:, first], q
    )
    poisoned = [x.at[:, 128:].set(jnp.nan) for x in (k, v)]
    other, other_pull = jax.vjp(
        lambda q: tiled_attention(q, *poisoned, mask, ScoreTerms(scale=0.2), blocks, True)[
            :, first
        ],
        q,
    )
    np.testing.assert_array_equal(other, out)
    np.testing.assert_array_equal(
        other_pull(g[:, first])[0][:, first], pull(g[:, first])[0][:, first]
    )
    # The control: queries that may see the poisoned keys.
    assert jnp.isnan(
        tiled_attention(q, *poisoned, mask, ScoreTerms(scale=0.2), blocks, True)[:, 128:]
    ).any()


def test_plan_visits_what_is_visible_and_masks_what_is_mixed():
    rng = np.random.default_rng(1)
    ids = packed(rng, 2, 500)
    blocks = BlockSizes(queries=64, keys=128, resident=256)
    for mask in (
        AttentionMask(causal=True),
        AttentionMask(window=70),
        AttentionMask(causal=True, window=40, prefix=jnp.array([10, 300])),
        AttentionMask(causal=True, q_segments=ids, kv_segments=ids),
    ):
        some, every = (
            np.broadcast_to(x, (2, 8, 4)) for x in tile_visibility(mask, 500, 500, blocks)
        )
        dense = np.broadcast_to(mask.dense(500, 500)[:, 0], (2, 500, 500))
        for row, i, j in np.ndindex(2, 8, 4):
            tile = dense[row, 64 * i : 64 * (i + 1), 128 * j : 128 * (j + 1)]
            assert some[row, i, j] or not tile.any()
            assert not every[row, i, j] or (tile.all() and tile.shape == (64, 128))
    some, every = tile_visibility(AttentionMask(causal=True), 512, 512, SMALL)
    tiles = plan_tiles(some, every, 2)
    assert tiles.counts.reshape(4, 2, 2).tolist() == [
        [[0, 1], [0, 0]],
        [[1, 2], [0, 0]],
        [[2, 2], [0, 1]],
        [[2, 2], [1, 2]],
    ]


def test_what_the_tpu_refuses_is_named_with_the_nearest_value():
    q = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    mask = AttentionMask()
    with pytest.raises(UserError, match="'tpu' does not support cpu: it needs a TPU"):
        attention(q, q, q, mask=mask, implementation="tpu")
    with compiling_for("tpu", "TPU v5 lite"):
        for changed, rule in (
            (q.astype(jnp.float16), "float16: it takes bfloat16 or float32"),
            (jnp.zeros((1, 8, 2, 288), jnp.bfloat16), "head_dim = 288: it takes at most 256"),
        ):
            with pytest.raises(
                UserError,
                match=f"'tpu' does not support {rule}.* take implementation = 'reference' by name",
            ):
                attention(changed, changed, changed, mask=mask)


def shapes(batch, queries, keys, heads, kv_heads, width, dtype=jnp.bfloat16):
    q, k = (
        jax.ShapeDtypeStruct((batch, *rest, width), dtype)
        for rest in ((queries, heads), (keys, kv_heads))
    )
    return q, k, k, q


def value_and_gradients(q, k, v, g, mask, terms):
    out, pull = jax.vjp(lambda q, k, v, terms: tpu.attention(q, k, v, mask, terms), q, k, v, terms)
    return out, pull(g)


def of(dtype, *shape):
    return jnp.zeros(shape, dtype)


CASES = {
    "packed": (
        shapes(2, 1000, 1000, 4, 2, 64),
        AttentionMask(
            causal=True,
            window=300,
            q_segments=of(jnp.int32, 2, 1000),
            kv_segments=of(jnp.int32, 2, 1000),
        ),
        ScoreTerms(softcap=30.0, sinks=of(jnp.float32, 4), scale=0.1),
    ),
    "cross": (
        shapes(2, 700, 900, 4, 1, 96),
        AttentionMask(
            causal=True,
            prefix=of(jnp.int32, 2),
            q_positions=of(jnp.int32, 2, 700),
            kv_positions=of(jnp.int32, 2, 900),
        ),
        ScoreTerms(alibi=of(jnp.float32, 4), bias=of(jnp.float32, 1, 4, 700, 900), scale=0.1),
    ),
    "wide": (
        shapes(1, 600, 600, 2, 2, 256, jnp.float32),
        AttentionMask(),
        ScoreTerms(bias=of(jnp.float32, 1, 1, 1, 600), scale=0.1),
    ),
}


@pytest.mark.parametrize("generation", rest_in("compilers", TPU_TOPOLOGIES, "v5e"))
@pytest.mark.parametrize("case", CASES)
def test_kernels_are_compiled_for_every_generation(generation, case):
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    qkvg, mask, terms = CASES[case]
    compiled = compile_on(tpu_devices(generation)[0], value_and_gradients, *qkvg, mask, terms)
    kernels = ["forward", "backward"] + ["bias"] * (terms.bias is not None)
    assert all(f"tessera_attention_{kernel}" in compiled.as_text() for kernel in kernels)


@pytest.mark.compilers
# Several chunks of resident tokens each: 2,048 of them fit on a v4, 16,384 on a v5e.
@pytest.mark.parametrize(("generation", "length"), [("v4", 16384), ("v5e", 65536)])
def test_memory_is_linear_in_the_length(generation, length):
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    mask, terms = AttentionMask(causal=True), ScoreTerms(scale=0.1)

    def temporaries(length):
        arguments = (*shapes(1, length, length, 1, 1, 128), mask, terms)
        compiled = compile_on(tpu_devices(generation)[0], value_and_gradients, *arguments)
        return compiled.memory_analysis().temp_size_in_bytes / (length * 128 * 2)

    # In arrays of the size of q; scores would be `length` / 64 of them.
    assert temporaries(length) < 12
    assert temporaries(2 * length) < 12


def test_kernels_run_once_a_device_under_a_mesh(monkeypatch):
    calls = []

    def wrong_attention(q, k, v, mask, terms):
        calls.append(q.shape)
        return tiled_attention(q, k, v, mask, terms, (SMALL, SMALL), True)

    monkeypatch.setattr(tpu, "attention", wrong_attention)
    monkeypatch.setattr(tpu, "unsupported_reason", lambda *_: None)
    rng = np.random.default_rng(0)
    q, k, v, g = (array(rng, 4, 130, heads, 32) for heads in (4, 2, 2, 4))
    ids = packed(rng, 4, 130)
    mask = AttentionMask(causal=True, q_segments=ids, kv_segments=ids)
    terms = {"bias": array(rng, 1, 4, 130, 130), "sinks": array(rng, 4)}

    def value_and_gradient(q, k, v, terms, implementation):
        def call(q, k, v, terms):
            return attention(q, k, v, mask=mask, implementation=implementation, **terms)

        out, pull = jax.vjp(call, q, k, v, terms)
        return out, pull(g)

    expected = value_and_gradient(q, k, v, terms, "reference")
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        found = jax.jit(value_and_gradient, static_argnums=4)(q, k, v, terms, "tpu")
    assert calls[0] == (2, 130, 2, 32)
    for got, want in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(got, want)


def test_blocks_of_a_smaller_memory_hold_less():
    long, sizes = (8192, 8192), {}
    for kind in ("TPU v4", "TPU v5"):
        with compiling_for("tpu", kind):
            forward, backward = tpu.choose_blocks(128, 2, False, *long)
            assert forward == backward
            sizes[kind] = forward.resident
            assert tpu.choose_blocks(256, 4, False, *long)[0].resident * 4 == sizes[kind]
            assert tpu.choose_blocks(128, 2, True, *long)[0].resident <= tpu.RESIDENT_WITH_BIAS
    assert sizes["TPU v4"] < sizes["TPU v5"]


@pytest.mark.parametrize(
    ("kind", "lengths", "forward", "backward"),
    [
        ("TPU v5", (8192, 8192), (512, 512, False), (512, 512)),
        ("TPU v5", (1, 200), (128, 256, False), (128, 256)),
        ("TPU v6 lite", (8192, 8192), (1024, 512, True), (512, 512)),
        ("TPU v6 lite", (300, 130), (512, 256, True), (512, 256)),
    ],
)
def test_tiles_are_no_longer_than_a_short_sequence_needs(kind, lengths, forward, backward):
    with compiling_for("tpu", kind):
        first, second = tpu.choose_blocks(128, 2, False, *lengths)
    assert (first.queries, first.keys, first.transposed) == forward
    assert (second.queries, second.keys, second.transposed) == (*backward, False)

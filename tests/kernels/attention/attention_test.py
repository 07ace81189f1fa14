"""Attention: every implementation equals the plain one, and the mask means what it says."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.kernels.attention import AttentionMask, attention, cpu_shards, cpu_tile


def inputs(batch, queries, keys, heads, kv_heads, width, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [
        (batch, queries, heads, width),
        (batch, keys, kv_heads, width),
        (batch, keys, kv_heads, width),
    ]
    q, k, v, g = (jnp.asarray(rng.normal(size=shape), dtype) for shape in (*shapes, shapes[0]))
    return q, k, v, g


def value_and_gradients(implementation, q, k, v, g, mask, **options):
    @jax.jit
    def run(q, k, v, mask):
        def call(q, k, v):
            return attention(q, k, v, mask=mask, implementation=implementation, **options)

        out, pull = jax.vjp(call, q, k, v)
        return (out, *pull(g))

    return run(q, k, v, mask)


def segments(batch, length, seed):
    """Packed rows: some documents after each other, then padding (0)."""
    rng = np.random.default_rng(seed)
    starts = rng.random((batch, length)) < 0.1
    ids = 1 + np.cumsum(starts, axis=1)
    return jnp.asarray(np.where(np.arange(length) < length - rng.integers(1, length // 2), ids, 0))


def plain_attention(q, k, v, visible):
    """In NumPy, a query and a head at a time."""
    out = np.zeros(q.shape)
    batch, queries, heads, width = q.shape
    for b, t, n in np.ndindex(batch, queries, heads):
        kv = n // (heads // k.shape[2])
        scores = k[b, :, kv] @ q[b, t, n] / np.sqrt(width)
        weights = np.exp(scores - scores.max()) * visible[b, t]
        if weights.sum() > 0:
            out[b, t, n] = weights @ v[b, :, kv] / weights.sum()
    return out


def visible_by_words(mask, batch, queries, keys):
    """The mask's docstring, read word by word."""
    out = np.zeros((batch, queries, keys), bool)
    for b, t, s in np.ndindex(out.shape):
        p_t = t if mask.q_positions is None else mask.q_positions[b, t]
        p_s = s if mask.kv_positions is None else mask.kv_positions[b, s]
        seen = (not mask.causal or p_t >= p_s) and (
            mask.window is None or abs(p_t - p_s) < mask.window
        )
        seen = seen or (mask.prefix is not None and p_s < mask.prefix[b])
        if mask.q_segments is not None:
            seen = (
                seen
                and mask.q_segments[b, t] == mask.kv_segments[b, s]
                and mask.kv_segments[b, s] != 0
            )
        out[b, t, s] = seen
    return out


MASKS = {
    "full": AttentionMask(),
    "causal": AttentionMask(causal=True),
    "window": AttentionMask(causal=True, window=3),
    "local": AttentionMask(window=2),
    "prefix": AttentionMask(causal=True, prefix=jnp.array([2, 5])),
    "window and prefix": AttentionMask(causal=True, window=2, prefix=jnp.array([0, 3])),
    "segments": AttentionMask(
        causal=True,
        q_segments=jnp.array([[1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 3, 3, 3, 0]]),
        kv_segments=jnp.array([[1, 1, 2, 2, 2, 0, 0], [1, 2, 2, 3, 3, 3, 0]]),
    ),
    "positions": AttentionMask(
        causal=True,
        q_positions=jnp.array([[4, 5, 6, 7, 8, 9, 10]] * 2),
        kv_positions=jnp.array([[6, 5, 4, 3, 2, 1, 0]] * 2),
    ),
}


@pytest.mark.parametrize("name", MASKS)
def test_dense_mask_is_the_description(name):
    mask = MASKS[name]
    expected = visible_by_words(mask, 2, 7, 7)[:, None]
    np.testing.assert_array_equal(np.broadcast_to(mask.dense(7, 7), expected.shape), expected)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_attention_equals_numpy_loops(name, implementation):
    q, k, v, _ = inputs(2, 7, 7, 4, 2, 8)
    expected = plain_attention(*map(np.asarray, (q, k, v)), visible_by_words(MASKS[name], 2, 7, 7))
    out = attention(q, k, v, mask=MASKS[name], implementation=implementation)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_reach_leaves_out_nothing_visible_and_blocks_above_the_diagonal():
    for mask in (MASKS["causal"], MASKS["window"], MASKS["local"], MASKS["full"]):
        visible = np.asarray(mask.dense(20, 13))[0, 0]
        for start in range(0, 20, 5):
            reach = mask.reach(start, start + 5, 13)
            hidden = visible[start : start + 5].copy()
            hidden[:, reach] = False
            assert not hidden.any()
    assert MASKS["causal"].reach(0, 5, 13) == slice(0, 5)
    assert MASKS["window"].reach(5, 10, 13) == slice(3, 10)


@pytest.mark.default_passes
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    # With small sizes there are shards, bands of several tiles and of the queries left over.
    small=st.booleans(),
    batch=st.sampled_from([1, 3]),
    queries=st.sampled_from([1, 60, 150, 300]),
    keys=st.sampled_from([40, 300]),
    heads=st.sampled_from([(1, 1), (6, 3), (3, 1)]),
    causal=st.booleans(),
    window=st.sampled_from([None, 1, 50]),
    packed=st.booleans(),
    terms=st.sets(st.sampled_from(["softcap", "sinks", "alibi"])),
    bias=st.sampled_from(
        [None, (0, 0, 0, 0), (1, 0, 0, 0), (0, 1, 1, 0), (1, 1, 0, 1), (1, 0, 1, 1)]
    ),
    seed=st.integers(0, 100),
)
def test_cpu_equals_reference_in_value_and_gradients(
    small, batch, queries, keys, heads, causal, window, packed, terms, bias, seed
):
    rng = np.random.default_rng(seed)
    q, k, v, g = inputs(batch, queries, keys, *heads, 8, seed=seed)
    longest = segments(batch, max(queries, keys), seed)
    ids = {"q_segments": longest[:, :queries], "kv_segments": longest[:, :keys]} if packed else {}
    mask = AttentionMask(causal=causal, window=window, **ids)
    arrays = {
        name: jnp.asarray(rng.random(heads[0]), jnp.float32) for name in sorted(terms - {"softcap"})
    }
    if bias is not None:
        whole = (batch, heads[0], queries, keys)
        shape = [1 if one else size for one, size in zip(bias, whole, strict=True)]
        arrays["bias"] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    softcap = 2.0 if "softcap" in terms else None

    def run(implementation):
        def call(q, k, v, arrays):
            return attention(
                q, k, v, mask=mask, softcap=softcap, implementation=implementation, **arrays
            )

        @jax.jit
        def both(q, k, v, arrays):
            out, pull = jax.vjp(call, q, k, v, arrays)
            return jax.tree.leaves((out, pull(g)))

        return both(q, k, v, arrays)

    with pytest.MonkeyPatch.context() as patch:
        if small:
            patch.setattr(cpu_tile, "TILE", 16)
            patch.setattr(cpu_tile, "TARGET_BANDS", 3)
            patch.setattr(cpu_shards, "MAX_SHARDS", 2)
            patch.setattr(cpu_shards, "MIN_SHARD_SCORES", 64)
        found = run("cpu")
    for got, want in zip(found, run("reference"), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5 * max(1.0, float(jnp.abs(want).max())))


def value_and_bias_gradients(implementation, q, k, v, g, mask, bias, **options):
    """Returns the values, and the gradients of q, k, v and the bias."""

    def call(q, k, v, bias):
        return attention(q, k, v, mask=mask, implementation=implementation, bias=bias, **options)

    @jax.jit
    def both(*arrays):
        out, pull = jax.vjp(call, *arrays)
        return (out, *pull(g))

    return both(q, k, v, bias)


def test_shards_of_heads_take_the_bias_of_their_heads(monkeypatch):
    args = inputs(1, 512, 512, 4, 2, 8)
    # Each head looks at another offset, so the bias of another head gives other values.
    distance = np.arange(512)[:, None] - np.arange(512)
    offsets = np.array([1, 20, 100, 300])
    bias = jnp.asarray(-0.1 * np.abs(distance - offsets[:, None, None])[None], jnp.float32)
    monkeypatch.setattr(cpu_shards, "MAX_SHARDS", 2)
    assert cpu_shards.shard_grid(*args[:2]).head_shards == 2

    found = value_and_bias_gradients("cpu", *args, AttentionMask(), bias)
    expected = value_and_bias_gradients("reference", *args, AttentionMask(), bias)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 4, 1, 36), (2, 4, 36, 1)], ids=["over queries", "over keys"])
def test_a_bias_that_is_broadcast_equals_the_reference(shape, monkeypatch):
    # Two bands of two tiles and four queries left over; the later ones do not reach the first keys.
    monkeypatch.setattr(cpu_tile, "TILE", 8)
    monkeypatch.setattr(cpu_tile, "TARGET_BANDS", 3)
    args = inputs(2, 36, 36, 4, 2, 8)
    mask = AttentionMask(causal=True, window=10)
    bias = jnp.asarray(np.random.default_rng(1).normal(size=shape), jnp.float32)
    # Without a sink, a number that is added to the scores of all keys changes nothing.
    sinks = jnp.arange(4, dtype=jnp.float32)

    found = value_and_bias_gradients("cpu", *args, mask, bias, sinks=sinks)
    expected = value_and_bias_gradients("reference", *args, mask, bias, sinks=sinks)
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


def test_cpu_in_bfloat16_is_as_near_to_float32_as_the_reference():
    mask = AttentionMask(causal=True)
    args = inputs(1, 200, 200, 4, 2, 16)
    exact = value_and_gradients("reference", *args, mask)
    rounded = [x.astype(jnp.bfloat16) for x in args]
    plain, fast = (value_and_gradients(name, *rounded, mask) for name in ("reference", "cpu"))
    for a, b, c in zip(exact, plain, fast, strict=True):
        assert c.dtype == jnp.bfloat16
        scale = np.abs(a).max()
        error, plain_error = (np.abs(np.asarray(x, np.float32) - a).max() / scale for x in (c, b))
        assert error < max(2 * plain_error, 0.01)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_query_that_sees_nothing_gets_zeros_and_no_gradient(implementation):
    q, k, v, g = inputs(1, 6, 6, 2, 2, 8)
    ids = jnp.array([[1, 1, 1, 0, 0, 0]])
    mask = AttentionMask(causal=True, q_segments=ids, kv_segments=ids)
    out, dq, dk, dv = value_and_gradients(implementation, q, k, v, g, mask)
    for x in (out, dq, dk, dv):
        assert np.all(np.asarray(x)[:, 3:] == 0)
        assert np.all(np.isfinite(x))
        assert np.any(np.asarray(x)[:, :3] != 0)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_later_tokens_are_not_seen(implementation):
    q, k, v, _ = inputs(1, 150, 150, 2, 2, 8)
    changed = [x.at[:, 140:].add(1.0) for x in (k, v)]
    for mask, same in ((AttentionMask(causal=True), True), (AttentionMask(), False)):
        a = attention(q, k, v, mask=mask, implementation=implementation)
        b = attention(q, *changed, mask=mask, implementation=implementation)
        assert np.array_equal(a[:, :140], b[:, :140]) is same


def test_reference_extras_equal_their_equations():
    q, k, v, _ = inputs(1, 5, 5, 2, 1, 4)
    rng = np.random.default_rng(1)
    bias, sinks = jnp.asarray(rng.normal(size=(1, 2, 5, 5)), jnp.float32), jnp.array([0.5, -1.0])
    slopes, distance = (
        jnp.array([0.5, 0.25]),
        np.abs(np.arange(5)[:, None] - np.arange(5)).astype(np.float32),
    )
    terms = {"bias": bias, "alibi": slopes, "softcap": 2.0, "sinks": sinks, "scale": 0.7}
    out = attention(q, k, v, mask=AttentionMask(), implementation="reference", **terms)
    scores = 0.7 * np.einsum("tnh,sh->nts", q[0], k[0, :, 0])
    weights = np.exp(2.0 * np.tanh(scores / 2.0) + bias[0] - slopes[:, None, None] * distance[None])
    weights /= weights.sum(-1, keepdims=True) + np.exp(sinks)[:, None, None]
    np.testing.assert_allclose(out[0], np.einsum("nts,sh->tnh", weights, v[0, :, 0]), atol=1e-5)


def test_causal_cpu_attention_computes_less_than_full():
    q, k, v, _ = inputs(1, 512, 512, 2, 2, 16)

    def flops(mask):
        run = jax.jit(lambda q, k, v: attention(q, k, v, mask=mask, implementation="cpu"))
        return run.lower(q, k, v).cost_analysis()["flops"]

    assert flops(AttentionMask(causal=True)) < 0.7 * flops(AttentionMask())
    assert flops(AttentionMask(causal=True, window=64)) < 0.5 * flops(AttentionMask())


def temporaries(implementation, length):
    """Returns the compiled temporaries of value and gradients, in arrays of the size of q."""
    q, k, v, g = (jax.ShapeDtypeStruct((1, length, 2, 64), jnp.float32) for _ in range(4))

    def run(q, k, v, g):
        mask = AttentionMask(causal=True)
        out, pull = jax.vjp(
            lambda *qkv: attention(*qkv, mask=mask, implementation=implementation), q, k, v
        )
        return out, pull(g)

    return jax.jit(run).lower(q, k, v, g).compile().memory_analysis().temp_size_in_bytes / (
        length * 128 * 4
    )


def test_memory_of_cpu_attention_is_linear_in_the_length():
    # Scores would be `length` / 64 of them.
    assert temporaries("cpu", 4096) < 12
    assert temporaries("cpu", 32768) < 12
    assert temporaries("reference", 4096) > 64


def test_what_an_implementation_does_not_support_is_named():
    q, k, v, _ = inputs(1, 4, 4, 2, 1, 8)
    mask = AttentionMask()
    with pytest.raises(UserError, match=r"'tpu' does not support"):
        attention(q, k, v, mask=mask, implementation="tpu")
    with pytest.raises(UserError, match=r"'cudnn' does not support prefix"):
        attention(q, k, v, mask=AttentionMask(prefix=jnp.array([1])), implementation="cudnn")
    with pytest.raises(
        UserError, match=r"'cudnn' does not support float32: it takes bfloat16 or float16"
    ):
        attention(q, k, v, mask=mask, implementation="cudnn")
    with pytest.raises(UserError, match=r"num_kv_heads = 3 does not divide num_heads = 4"):
        attention(*inputs(1, 4, 4, 4, 3, 8)[:3], mask=mask)
    with pytest.raises(UserError, match=r"v in bfloat16 must have the type of q, float32"):
        attention(q, k, v.astype(jnp.bfloat16), mask=mask)
    with pytest.raises(UserError, match=r"window = 0 must be at least 1"):
        AttentionMask(window=0)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_rows_cut_along_their_length_see_by_the_offset_of_each_part(implementation):
    """The queries of each half over the keys of each half, joined by hand, are the whole."""
    q, k, v, _ = inputs(2, 8, 8, 2, 1, 4)
    ids = segments(2, 8, seed=3)
    whole = AttentionMask(causal=True, window=5, q_segments=ids, kv_segments=ids)
    visible = np.asarray(whole.dense(8, 8))[:, 0]
    expected = attention(q, k, v, mask=whole, implementation=implementation)
    # A device with the second half of the queries and all keys.
    part = dataclasses.replace(whole, q_segments=ids[:, 4:], q_offset=jnp.int32(4))
    np.testing.assert_array_equal(part.dense(4, 8)[:, 0], visible[:, 4:])
    found = attention(q[:, 4:], k, v, mask=part, implementation=implementation)
    np.testing.assert_allclose(found, expected[:, 4:], atol=1e-6)
    # One with the second half of both, which sees less.
    part = dataclasses.replace(part, kv_segments=ids[:, 4:], kv_offset=jnp.int32(4))
    np.testing.assert_array_equal(part.dense(4, 4)[:, 0], visible[:, 4:, 4:])
    # Without the offset a part sees other keys: the control.
    blind = dataclasses.replace(whole, q_segments=ids[:, 4:])
    assert (np.asarray(blind.dense(4, 8))[:, 0] != visible[:, 4:]).any()


def test_positions_and_an_offset_of_the_same_side_are_a_fault():
    with pytest.raises(AssertionError, match="kv: positions and their offset"):
        AttentionMask(kv_positions=jnp.zeros((1, 4), jnp.int32), kv_offset=jnp.int32(4))

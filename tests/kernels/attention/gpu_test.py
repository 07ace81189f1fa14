"""The GPU implementations: Pallas kernels for Hopper against the reference in JAX's interpreter,
and compiled for an H200.
"""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.kernels import choice
from research.kernels.attention import (
    AttentionMask,
    ScoreTerms,
    attention,
    cudnn,
    gpu,
    implementations,
    reference,
)
from research.kernels.attention.gpu_plan import Plan
from research.kernels.attention.gpu_visits import block_kinds, visits
from research.parallel.target import compiling_for
from research.scaling.topology import compile_on

H200 = "NVIDIA H200"


def operands(batch, queries, keys, heads, kv_heads, width, dtype=jnp.float16, seed=0):
    rng = np.random.default_rng(seed)
    shapes = [
        (batch, queries, heads, width),
        (batch, keys, kv_heads, width),
        (batch, keys, kv_heads, width),
    ]
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in (*shapes, shapes[0]))


def documents(batch, length, size):
    """Packed rows of documents of about `size` tokens, with padding at the end."""
    row = np.where(np.arange(length) < length - length // 8, 1 + np.arange(length) // size, 0)
    return jnp.asarray(np.tile(row, (batch, 1)))


def value_and_gradients(function, q, k, v, g, mask, terms):
    def call(q, k, v, bias, sinks):
        return function(q, k, v, mask, dataclasses.replace(terms, bias=bias, sinks=sinks))

    out, pull = jax.vjp(call, q, k, v, terms.bias, terms.sinks)
    return (out, *pull(g))


def assert_equals_reference(q, k, v, g, mask, terms, tolerance):
    got = jax.jit(functools.partial(value_and_gradients, gpu.attention))(q, k, v, g, mask, terms)
    wide = [x.astype(jnp.float32) for x in (q, k, v, g)]
    expected = jax.jit(functools.partial(value_and_gradients, reference.attention))(
        *wide, mask, terms
    )
    for name, a, b in zip(("out", "dq", "dk", "dv", "dbias", "dsinks"), got, expected, strict=True):
        if b is not None:
            scale = max(1.0, float(jnp.max(jnp.abs(b))))
            np.testing.assert_allclose(
                np.float32(a) / scale, np.float32(b) / scale, atol=tolerance, err_msg=name
            )


@st.composite
def calls(draw):
    batch, heads = draw(st.sampled_from([(1, (2, 1)), (2, (1, 1))]))
    queries, keys = draw(st.sampled_from([1, 70, 100])), draw(st.sampled_from([33, 120]))
    mask = AttentionMask(
        causal=draw(st.booleans()),
        window=draw(st.sampled_from([None, 20])),
        prefix=draw(st.sampled_from([None, jnp.arange(batch) * 9])),
    )
    if draw(st.booleans()):
        ids = {
            "q_segments": documents(batch, queries, 40),
            "kv_segments": documents(batch, keys, 40),
        }
        mask = dataclasses.replace(mask, **ids)
    if draw(st.booleans()):
        late, backwards = jnp.arange(queries) + 5, jnp.arange(keys)[::-1]
        positions = {"q_positions": late, "kv_positions": backwards}
        mask = dataclasses.replace(
            mask, **{name: jnp.tile(p, (batch, 1)) for name, p in positions.items()}
        )
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    shape = draw(
        st.sampled_from(
            [None, (1, heads[0], queries, keys), (batch, 1, 1, keys), (1, 1, queries, 1)]
        )
    )
    terms = ScoreTerms(
        bias=None if shape is None else jnp.asarray(rng.normal(size=shape), jnp.float32),
        alibi=draw(st.sampled_from([None, jnp.linspace(0.1, 0.3, heads[0])])),
        sinks=draw(st.sampled_from([None, jnp.linspace(-1.0, 2.0, heads[0])])),
        softcap=draw(st.sampled_from([None, 4.0])),
        scale=0.2,
    )
    width = draw(st.sampled_from([32, 80, 160]))
    return *operands(batch, queries, keys, *heads, width), mask, terms


@pytest.mark.thorough
@settings(max_examples=2, deadline=None, derandomize=True)
@given(calls())
def test_kernel_equals_reference_in_value_and_every_gradient(call):
    assert_equals_reference(*call, tolerance=4e-3)


def test_kernel_equals_reference_with_everything_at_once():
    mask = AttentionMask(
        causal=True,
        window=50,
        prefix=jnp.array([30]),
        q_segments=documents(1, 140, 60),
        kv_segments=documents(1, 150, 60),
    )
    rng = np.random.default_rng(1)
    bias = jnp.asarray(rng.normal(size=(1, 1, 140, 150)), jnp.float32)
    terms = ScoreTerms(
        bias=bias, alibi=jnp.array([0.2]), sinks=jnp.array([0.5]), softcap=5.0, scale=0.125
    )
    call = operands(1, 140, 150, 1, 1, 64, jnp.bfloat16)
    assert_equals_reference(*call, mask, terms, tolerance=2e-2)
    # The control: the tolerance is one that a wrong mask does not keep.
    out, other = (
        np.float32(reference.attention(*call[:3], m, terms))
        for m in (mask, dataclasses.replace(mask, causal=False))
    )
    assert np.max(np.abs(out - other)) > 0.2


@pytest.mark.parametrize(
    "mask",
    [
        AttentionMask(),
        AttentionMask(causal=True),
        AttentionMask(window=100),
        AttentionMask(causal=True, window=90, prefix=jnp.array([10, 200])),
        AttentionMask(
            causal=True, q_segments=documents(2, 500, 130), kv_segments=documents(2, 300, 130)
        ),
        AttentionMask(causal=True, q_positions=jnp.tile(jnp.arange(500)[::-1], (2, 1))),
    ],
)
def test_blocks_that_the_mask_rules_out_are_never_visited(mask):
    plan = Plan(500, 300, 1, mask.causal, mask.window, None, 1.0, True)
    kinds = np.asarray(block_kinds(mask, plan, 128, 64))
    visible = np.asarray(jnp.broadcast_to(mask.dense(500, 300), (2, 1, 500, 300)))[:, 0]
    order, counts = (np.asarray(x) for x in visits(jnp.asarray(kinds)))
    for b, i, j in np.ndindex(2, *kinds.shape[1:]):
        block = visible[b, 128 * i : 128 * (i + 1), 64 * j : 64 * (j + 1)]
        kind, row = kinds[b % len(kinds), i, j], (b % len(kinds), i)
        assert kind != 0 or (block.all() and block.shape[1] == 64)
        # It goes by the bounds of a block, which are exact where the order of tokens is.
        assert (kind == 2) == (not block.any()) or mask.prefix is not None
        assert (kind == 2) <= (not block.any())
        assert (j in order[row][: counts[row][1]]) == (kind < 2)
        assert (j in order[row][: counts[row][0]]) == (kind == 0)


def shapes(queries, keys, heads, width, dtype=jnp.bfloat16):
    tokens = [
        (1, queries, heads, width),
        (1, keys, heads, width),
        (1, keys, heads, width),
        (1, queries, heads, width),
    ]
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in tokens]


@pytest.mark.compilers
@pytest.mark.parametrize(
    ("width", "mask", "terms"),
    [
        (128, AttentionMask(causal=True), ScoreTerms(scale=0.1)),
        (
            64,
            AttentionMask(
                causal=True,
                window=70,
                prefix=jnp.array([9]),
                q_segments=jnp.ones((1, 200), jnp.int32),
                kv_segments=jnp.ones((1, 300), jnp.int32),
                q_positions=jnp.ones((1, 200), jnp.int32),
                kv_positions=jnp.ones((1, 300), jnp.int32),
            ),
            ScoreTerms(jnp.zeros((1, 2, 200, 300)), jnp.ones(2), jnp.ones(2), 5.0, 0.1),
        ),
        (
            256,
            AttentionMask(),
            ScoreTerms(bias=jnp.zeros((1, 1, 1, 300), jnp.bfloat16), softcap=50.0),
        ),
    ],
)
def test_kernels_compile_for_an_h200(h200, width, mask, terms):
    program = compile_on(
        h200,
        functools.partial(value_and_gradients, gpu.attention),
        *shapes(200, 300, 2, width),
        mask,
        terms,
    )
    assert program.as_text().count("mosaic_gpu_v2") >= 3


@pytest.mark.compilers
@pytest.mark.parametrize("window", [None, 16])
def test_cudnn_compiles_for_an_h200(h200, window):
    call = (
        *shapes(64, 64, 2, 64),
        AttentionMask(causal=True, window=window),
        ScoreTerms(scale=0.1),
    )
    text = compile_on(
        h200, functools.partial(value_and_gradients, cudnn.attention), *call
    ).as_text()
    assert "fmhaSoftmaxBackward" in text


@pytest.mark.compilers
def test_cudnn_compiles_with_the_gradient_of_a_bias(h200):
    terms = ScoreTerms(bias=jnp.zeros((1, 2, 64, 64), jnp.bfloat16), scale=0.1)
    q, k, v, g = operands(1, 64, 64, 2, 2, 64, jnp.bfloat16)
    with compiling_for("gpu", H200):
        assert cudnn.unsupported_reason(q, k, AttentionMask(), terms) is None
    text = compile_on(
        h200,
        functools.partial(value_and_gradients, cudnn.attention),
        q,
        k,
        v,
        g,
        AttentionMask(),
        terms,
    )
    assert "fmhaScaleBiasSoftmaxBackward" in text.as_text()


@pytest.mark.compilers
def test_temporaries_hold_no_scores_at_32768_tokens(h200):
    length, width = 32768, 128
    call = (
        *shapes(length, length, 1, width),
        AttentionMask(causal=True),
        ScoreTerms(softcap=50.0, scale=0.1),
    )
    program = compile_on(h200, functools.partial(value_and_gradients, gpu.attention), *call)
    # All that is not an operand or a gradient, the lists of blocks included, is smaller than one
    # operand.
    assert program.memory_analysis().temp_size_in_bytes < length * width * 2 / 4


REFUSED = [
    (cudnn, {"mask": AttentionMask(prefix=jnp.array([1]))}, "prefix"),
    (cudnn, {"mask": AttentionMask(window=4)}, "it takes a window with causal = True"),
    (cudnn, {"dtype": jnp.float32}, "float32: it takes bfloat16 or float16"),
    (cudnn, {"width": 30}, "it takes multiples of 8 up to 128, such as 32"),
    (cudnn, {"width": 256}, "such as 128"),
    (
        cudnn,
        {"mask": AttentionMask(causal=True), "keys": 8},
        "it takes as many queries as keys, such as 8",
    ),
    (
        cudnn,
        {"terms": ScoreTerms(bias=jnp.zeros((1, 1, 6, 6))), "batch": 2},
        "it gives its gradient at batch = 1",
    ),
    (
        cudnn,
        {"terms": ScoreTerms(bias=jnp.zeros((1, 1, 6, 6)))},
        r"it takes \(1, 2, 6, 6\), with nothing broadcast",
    ),
    (
        cudnn,
        {"terms": ScoreTerms(bias=jnp.zeros((1, 2, 6, 6)))},
        "bias in float32: it takes it in the queries'",
    ),
    (
        cudnn,
        {"terms": ScoreTerms(bias=jnp.zeros((1, 2, 6, 7), jnp.bfloat16)), "keys": 7},
        "it takes even lengths, such as 6 and 8",
    ),
    (gpu, {"dtype": jnp.float32}, "float32: it takes bfloat16 or float16"),
    (gpu, {"width": 257}, "head_dim = 257: it takes 1 to 256, such as 256"),
    (gpu, {"chip": "NVIDIA A100"}, "it needs a Hopper GPU, such as an H200"),
    (gpu, {"platform": "cpu"}, "it needs a GPU"),
    (gpu, {"mask": AttentionMask(window=4, prefix=jnp.array([1]))}, None),
]


@pytest.mark.parametrize(("implementation", "given", "rule"), REFUSED)
def test_unsupported_reason_names_the_rule_and_the_nearest_value(implementation, given, rule):
    usual = {
        "mask": AttentionMask(),
        "terms": ScoreTerms(),
        "dtype": jnp.bfloat16,
        "width": 64,
        "batch": 1,
    }
    call = {**usual, "keys": 6, "chip": H200, "platform": "gpu", **given}
    q = jnp.zeros((call["batch"], 6, 2, call["width"]), call["dtype"])
    k = jnp.zeros((call["batch"], call["keys"], 2, call["width"]), call["dtype"])
    with compiling_for(call["platform"], call["chip"]):
        reason = implementation.unsupported_reason(q, k, call["mask"], call["terms"])
    if rule is None:
        assert reason is None
    else:
        with pytest.raises(UserError, match=rule):
            raise UserError(reason)


def test_auto_prefers_cudnn_then_the_kernel_and_says_why_once(caplog):
    q = jnp.zeros((1, 128, 2, 64), jnp.bfloat16)
    prefixed = AttentionMask(causal=True, prefix=jnp.array([3]))
    choice._report.cache_clear()
    with compiling_for("gpu", H200), caplog.at_level(logging.INFO, logger="tessera"):
        for _ in range(2):
            jax.eval_shape(lambda q, k, v: attention(q, k, v, mask=prefixed), q, q, q)
            call = (q, q, AttentionMask(causal=True), ScoreTerms())
            assert implementations.choose_name("auto", *call) == "cudnn"
    messages = [record.getMessage() for record in caplog.records]
    assert messages == [
        "attention on gpu: gpu (cudnn does not support prefix)",
        "attention on gpu: cudnn",
    ]


def test_auto_refuses_what_no_gpu_implementation_takes():
    q = jnp.zeros((1, 8, 2, 300), jnp.bfloat16)
    with (
        compiling_for("gpu", H200),
        pytest.raises(UserError, match="'gpu' does not support head_dim = 300"),
    ):
        attention(q, q, q, mask=AttentionMask())

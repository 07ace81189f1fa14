"""Cross-entropy in chunks: equal to the plain one, and without logits of the whole batch."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.kernels.cross_entropy import cross_entropy, fused, tiles
from research.parallel.target import compiling_for
from tests.kernels.cross_entropy.cases import (
    D,
    V,
    inputs,
    summed,
    value_and_gradients,
    weighted,
    with_z_loss,
)


def test_reference_equals_its_equation():
    hidden, table, targets, _ = inputs((7,))
    logits = np.asarray(hidden, np.float64) @ np.asarray(table, np.float64).T
    log_z = np.log(np.exp(logits).sum(-1))
    zeros = jnp.zeros(7)
    options = {"implementation": "reference"}
    _, (nll, got) = cross_entropy(weighted, hidden, table.T, targets, zeros, zeros, **options)
    np.testing.assert_allclose(got, log_z, rtol=1e-5)
    np.testing.assert_allclose(nll, log_z - logits[np.arange(7), targets], rtol=1e-5, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(
    batch=st.sampled_from([(1,), (3, 25)]),
    token_chunk=st.sampled_from([1, 20, 1000, None]),
    vocab_chunk=st.sampled_from([30, 101, None]),
    softcap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 100),
)
def test_chunks_equal_the_reference(batch, token_chunk, vocab_chunk, softcap, seed):
    args = inputs(batch, seed=seed)
    expected = value_and_gradients(*args, implementation="reference", softcap=softcap)
    chunks = {"token_chunk": token_chunk, "vocab_chunk": vocab_chunk}
    got = value_and_gradients(*args, implementation="chunked", softcap=softcap, **chunks)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_kernel_gradient_of_bfloat16_hidden_states_is_summed_in_float32():
    hidden, table, targets, cotangents = inputs((400,), jnp.bfloat16)
    exact = value_and_gradients(
        hidden.astype(jnp.float32), table, targets, cotangents, implementation="reference"
    )
    nll, _, dhidden, dtable = value_and_gradients(
        hidden, table, targets, cotangents, token_chunk=50
    )
    assert (nll.dtype, dhidden.dtype, dtable.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    np.testing.assert_allclose(nll, exact[0], atol=0.05)
    np.testing.assert_allclose(dtable, exact[3], atol=0.02 * np.abs(exact[3]).max())


def biggest_float32(implementation="chunked", **options):
    """Returns the most elements that a float32 value of the compiled gradient has."""
    hidden, table, targets, cotangents = inputs((16, 64), vocab=512)
    options["implementation"] = implementation

    def loss(hidden, table):
        return cross_entropy(weighted, hidden, table.T, targets, *cotangents, **options)[0]

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, table).compile().as_text()
    sizes = [shape.split("]")[0] for shape in text.split("f32[")[1:]]
    return max(int(np.prod([int(n) for n in size.split(",") if n])) for size in sizes)


def test_float32_logits_of_the_batch_never_exist():
    assert biggest_float32(token_chunk=128) == 128 * 512
    assert biggest_float32(token_chunk=1024, vocab_chunk=64) <= 1024 * 64


def test_float32_logits_of_the_batch_exist_in_the_reference():
    assert biggest_float32(implementation="reference") == 16 * 64 * 512


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    batch=st.sampled_from([(1,), (3, 7), (5, 8)]),
    logits=st.sampled_from([4 * V, 2**25]),
    tile=st.sampled_from([(2**22, 2**12), (64, 40)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
    softcap=st.sampled_from([None, 2.0]),
    label_smoothing=st.sampled_from([0.0, 0.1]),
)
def test_a_gradient_made_beside_the_loss_equals_the_reference(
    batch, logits, tile, dtype, softcap, label_smoothing
):
    given = inputs(batch, dtype)
    weights = jnp.asarray(np.random.default_rng(1).integers(0, 3, batch), jnp.float32)
    options = {"softcap": softcap, "label_smoothing": label_smoothing}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fused, "MAX_LOGITS", logits)
        patch.setattr(tiles, "CPU_TILE_ELEMENTS", tile[0])
        patch.setattr(tiles, "MAX_VOCAB_CHUNK", tile[1])
        found = summed("fused", given, weights, **options)
    expected = summed("reference", given, weights, **options)
    tolerance = 1e-5 if dtype == jnp.float32 else 0.02
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        a, b = np.float32(a), np.float32(b)
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


def test_padding_of_a_chunk_has_no_gradient_where_a_loss_divides_by_a_count(monkeypatch):
    hidden, table, targets, _ = inputs((7,))
    counts = jnp.asarray([1.0, 2.0, 4.0, 1.0, 3.0, 5.0, 2.0])

    # A count of 0, as padding has, gives the cotangent 1 / 0.
    def mean_loss(nll, log_z, counts):
        return (nll / counts).sum(), log_z

    def kernel_gradient(implementation):
        def call(table):
            loss, _ = cross_entropy(
                mean_loss, hidden, table.T, targets, counts, implementation=implementation
            )
            return loss

        return jax.jit(jax.grad(call))(table)

    # 7 tokens in chunks of 4: the second chunk has one token of padding.
    monkeypatch.setattr(fused, "MAX_LOGITS", 4 * V)
    found = kernel_gradient("fused")
    np.testing.assert_allclose(found, kernel_gradient("reference"), atol=1e-5)


def test_a_gradient_made_beside_the_loss_makes_the_logits_once():
    def products(implementation):
        hidden, table, targets, _ = inputs((64,), vocab=128)

        def call(hidden, table):
            loss, _ = cross_entropy(
                with_z_loss, hidden, table.T, targets, jnp.ones(64), implementation=implementation
            )
            return loss

        return jax.jit(jax.grad(call, argnums=(0, 1))).lower(hidden, table).cost_analysis()["flops"]

    product = 2 * 64 * 128 * D
    assert products("fused") < 3.9 * product < products("chunked")


@pytest.mark.parametrize(
    ("vocab", "dtype", "platform", "expected"),
    [
        (101, "bfloat16", "cpu", True),
        # The largest vocabulary of which `MIN_FAST_CHUNK` tokens fit, and the next.
        (2**16, "bfloat16", "cpu", True),
        (2**16 + 1, "bfloat16", "cpu", False),
        (2**17, "float32", "cpu", True),
        (2**17, "bfloat16", "cpu", False),
        (101, "float32", "tpu", False),
    ],
)
def test_auto_makes_the_gradient_beside_the_loss_where_that_is_fast(
    vocab, dtype, platform, expected, monkeypatch
):
    class FusedError(Exception):
        pass

    def taken(*_):
        raise FusedError

    monkeypatch.setattr(fused, "summed_loss", taken)
    hidden, table, targets, _ = jax.eval_shape(lambda: inputs((64,), dtype, vocab))
    call = lambda h, t, y: cross_entropy(with_z_loss, h, t.T, y, jnp.ones(64))  # noqa: E731
    with (
        compiling_for(platform),
        pytest.raises(FusedError) if expected else contextlib.nullcontext(),
    ):
        jax.eval_shape(call, hidden, table, targets)


@pytest.mark.default_passes
@pytest.mark.parametrize(
    "chunks", [{}, {"token_chunk": 5, "vocab_chunk": 30}, {"implementation": "reference"}]
)
def test_label_smoothing_equals_optax(chunks):
    hidden, table, targets, cotangents = inputs((3, 7))
    got = value_and_gradients(hidden, table, targets, cotangents, label_smoothing=0.2, **chunks)

    def plain(hidden, table):
        logits = hidden @ table.T
        labels = optax.smooth_labels(jax.nn.one_hot(targets, V), 0.2)
        return optax.softmax_cross_entropy(logits, labels), jax.nn.logsumexp(logits, axis=-1)

    out, pull = jax.vjp(plain, hidden, table)
    for a, b in zip(got, (*out, *pull(cotangents)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def test_label_smoothing_of_one_is_refused():
    hidden, table, targets, _ = inputs((3,))
    with pytest.raises(UserError, match=r"label_smoothing = 1.0 must lie in \[0, 1\)"):
        cross_entropy(weighted, hidden, table.T, targets, label_smoothing=1.0)


def test_a_tile_is_larger_where_there_is_no_cache_to_fit():
    assert tiles.default_vocab_chunk(128_256) == 4096
    assert tiles.default_vocab_chunk(101) == 101
    assert tiles.default_token_chunk(4096) == 1024
    with compiling_for("tpu"):
        assert tiles.default_token_chunk(4096) == 4096


def test_a_chunk_below_one_is_refused():
    hidden, table, targets, _ = inputs((3,))
    with pytest.raises(UserError, match=r"token_chunk = 0"):
        cross_entropy(weighted, hidden, table.T, targets, token_chunk=0)

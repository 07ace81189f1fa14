"""Cross-entropy in chunks: equal to the plain one, and without logits of the whole batch."""

import contextlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from research.core.errors import UserError
from research.kernels.cross_entropy import cross_entropy, fused, tiles
from research.parallel.target import compiling_for
from research.scaling.topology import compile_on, tpu_devices

D, V = 12, 101


def inputs(batch, dtype=jnp.float32, vocab=V, seed=0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(*batch, D)), dtype)
    table = jnp.asarray(rng.normal(size=(vocab, D)), jnp.float32)
    cotangents = tuple(jnp.asarray(rng.normal(size=batch), jnp.float32) for _ in range(2))
    return hidden, table, jnp.asarray(rng.integers(vocab, size=batch)), cotangents


def weighted(nll, log_z, g_nll, g_log_z):
    """Returns a sum whose gradients by both losses are the weights, and the losses."""
    return jnp.vdot(nll, g_nll) + jnp.vdot(log_z, g_log_z), (nll, log_z)


def value_and_gradients(hidden, table, targets, cotangents, implementation="chunked", **options):
    """Returns nll and log_z of each token, and the gradients of `hidden` and `table`."""
    options["implementation"] = implementation

    def run(hidden, table):
        return cross_entropy(weighted, hidden, table.T, targets, *cotangents, **options)

    gradients = jax.value_and_grad(run, argnums=(0, 1), has_aux=True)
    (_, losses), (dhidden, dtable) = jax.jit(gradients)(hidden, table)
    nll, log_z = (x.reshape(targets.shape) for x in losses)
    return nll, log_z, dhidden, dtable


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


MESHES = {
    "tokens, vocabulary": (
        (4, 2),
        ("data", "tensor"),
        PartitionSpec("data"),
        PartitionSpec("tensor"),
    ),
    "tokens twice, width": (
        (4, 2),
        ("data", "fsdp"),
        PartitionSpec(("data", "fsdp")),
        PartitionSpec(None, "fsdp"),
    ),
}


def on_mesh(name, hidden, table):
    """Returns the mesh, and the inputs laid out on it; hidden states that it cannot shard are
    on all devices.
    """
    sizes, names, hidden_spec, table_spec = MESHES[name]
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 2)
    hidden_spec = hidden_spec if hidden.shape[0] % mesh.size == 0 else PartitionSpec()
    hidden = jax.device_put(hidden, NamedSharding(mesh, hidden_spec))
    return mesh, hidden, jax.device_put(table, NamedSharding(mesh, table_spec))


@pytest.mark.parametrize("batch", [(8, 16), (5, 7)], ids=["evenly", "not at all"])
@pytest.mark.parametrize("name", MESHES)
def test_chunks_equal_the_reference_on_a_mesh_that_splits(name, batch):
    hidden, table, targets, cotangents = inputs(batch, vocab=64)
    expected = value_and_gradients(hidden, table, targets, cotangents, implementation="reference")
    mesh, hidden, table = on_mesh(name, hidden, table)
    with jax.set_mesh(mesh):
        got = value_and_gradients(hidden, table, targets, cotangents, token_chunk=3)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def compiled_gradient(mesh, hidden, table, targets, cotangents, **options):
    """Returns the HLO of the compiled gradient on a mesh."""
    options["implementation"] = "chunked"

    def loss(hidden, table):
        return cross_entropy(weighted, hidden, table.T, targets, *cotangents, **options)[0]

    with jax.set_mesh(mesh):
        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(hidden, table).compile().as_text()


def collectives(text):
    """Returns (operation, elements) of each collective in HLO."""
    found = []
    for line in text.splitlines():
        match = re.search(r"= (.*?) (all-\w+|reduce-scatter|collective-permute)(-start)?\(", line)
        if match:
            shapes = re.findall(r"\[([\d,]*)\]", match.group(1))
            found += [
                (match.group(2), math.prod(int(n) for n in shape.split(",") if n))
                for shape in shapes
            ]
    return found


def loops_and_all(name):
    """Returns the collectives in the loops over chunks, and all that there are."""
    hidden, table, targets, cotangents = inputs((16, 32), vocab=64)
    mesh, hidden, table = on_mesh(name, hidden, table)
    text = compiled_gradient(mesh, hidden, table, targets, cotangents, token_chunk=4, vocab_chunk=8)
    loop_bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    assert len(loop_bodies) == 4, (
        "forward and backward, a loop over the vocabulary and in it one over tokens"
    )
    loops = [
        part for part in text.split("\n\n") if part.strip().split(" ")[0].lstrip("%") in loop_bodies
    ]
    return collectives("\n".join(loops)), collectives(text)


@pytest.mark.parametrize("name", MESHES)
def test_loops_over_chunks_send_nothing(name):
    inside, everywhere = loops_and_all(name)
    assert inside == []
    assert any(operation == "all-reduce" for operation, _ in everywhere)


SHARDED = {
    "tensor 4": ((4,), ("tensor",)),
    "data 2, tensor 4": ((2, 4), ("data", "tensor")),
    "data 2, fsdp 2, tensor 2": ((2, 2, 2), ("data", "fsdp", "tensor")),
}


def with_sharded_vocabulary(name, vocab):
    """Returns the mesh, and inputs on it: tokens over the batch axes, vocabulary over `tensor`,
    width over `fsdp`.
    """
    sizes, names = SHARDED[name]
    mesh = jax.make_mesh(
        sizes,
        names,
        axis_types=(AxisType.Auto,) * len(names),
        devices=jax.devices()[: math.prod(sizes)],
    )
    hidden, table, targets, cotangents = inputs((8, 32), vocab=vocab)
    batch = tuple(axis for axis in names if axis != "tensor") or None
    columns = "tensor" if vocab % mesh.shape["tensor"] == 0 else None
    table_spec = PartitionSpec(columns, "fsdp" if "fsdp" in names else None)
    hidden = jax.device_put(hidden, NamedSharding(mesh, PartitionSpec(batch)))
    return mesh, hidden, jax.device_put(table, NamedSharding(mesh, table_spec)), targets, cotangents


@pytest.mark.fast_cases("data 2, fsdp 2, tensor 2-not at all", "tensor 4-evenly")
@pytest.mark.parametrize("vocab", [104, 101], ids=["evenly", "not at all"])
@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_vocabulary_equals_one_device(name, vocab):
    options = {"label_smoothing": 0.1, "softcap": 5.0}
    expected = value_and_gradients(
        *inputs((8, 32), vocab=vocab), implementation="reference", **options
    )
    mesh, *args = with_sharded_vocabulary(name, vocab)
    with jax.set_mesh(mesh):
        got = value_and_gradients(*args, token_chunk=7, vocab_chunk=10, **options)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5)


def sharded_sizes(name, **options):
    """Returns the most elements gathered at once, and the most of any float32 value, of the
    compiled gradient.
    """
    text = compiled_gradient(*with_sharded_vocabulary(name, 1024), **options)
    values = [
        math.prod(int(n) for n in shape.split(",") if n)
        for shape in re.findall(r"f32\[([\d,]*)\]", text)
    ]
    gathered = [
        elements
        for operation, elements in collectives(text)
        if operation in ("all-gather", "all-to-all")
    ]
    return max(gathered, default=0), max(values)


@pytest.mark.parametrize("name", SHARDED)
def test_columns_and_logits_stay_on_their_device(name):
    mesh = with_sharded_vocabulary(name, 1024)[0]
    columns, tokens = 1024 // mesh.shape["tensor"], 256 // (mesh.size // mesh.shape["tensor"])
    gathered, largest = sharded_sizes(name, token_chunk=16, vocab_chunk=64)
    # The width over `fsdp` is put together, for the device's own columns.
    assert gathered == (D * columns if "fsdp" in mesh.axis_names else 0)
    assert largest <= max(D * columns, tokens * D)


@pytest.mark.parametrize("name", SHARDED)
def test_columns_or_logits_leave_it_where_tensor_shards_nothing(name, monkeypatch):
    monkeypatch.setattr(tiles, "TENSOR_AXIS", "no such axis")
    gathered, largest = sharded_sizes(name, token_chunk=16, vocab_chunk=64)
    assert max(gathered, largest) >= D * 1024


def summed(implementation, inputs, weights, **options):
    hidden, table, targets, _ = inputs

    def call(hidden, table):
        return cross_entropy(
            with_z_loss, hidden, table.T, targets, weights, implementation=implementation, **options
        )

    (total, nll_sum), gradients = jax.jit(jax.value_and_grad(call, argnums=(0, 1), has_aux=True))(
        hidden, table
    )
    return jnp.stack([total, nll_sum]), *gradients


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
        patch.setattr(fused, "LOGITS", logits)
        patch.setattr(tiles, "CPU_TILE_ELEMENTS", tile[0])
        patch.setattr(tiles, "TILE_VOCABULARY", tile[1])
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
    monkeypatch.setattr(fused, "LOGITS", 4 * V)
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


def test_tokens_may_be_sharded_where_the_forward_makes_the_gradient_but_not_the_vocabulary():
    given = inputs((16, 32), vocab=64)
    weights = jnp.ones((16, 32))
    expected = summed("reference", given, weights)
    mesh, hidden, table = on_mesh("tokens twice, width", *given[:2])
    with jax.set_mesh(mesh):
        for a, b in zip(
            summed("fused", (hidden, table, *given[2:]), weights), expected, strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(jnp.abs(b).max())))
    mesh, hidden, table = on_mesh("tokens, vocabulary", *given[:2])
    with jax.set_mesh(mesh):
        with pytest.raises(
            UserError, match="'fused' needs the whole vocabulary on each device: take 'chunked'"
        ):
            summed("fused", (hidden, table, *given[2:]), weights)
        for a, b in zip(
            summed("auto", (hidden, table, *given[2:]), weights), expected, strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-5 * max(1, float(jnp.abs(b).max())))


TOKENS, VOCABULARY = 8192, 128_256


def with_z_loss(nll, log_z, weights):
    """Returns what training minimizes and reports, summed over tokens."""
    return jnp.vdot(nll + 0.01 * log_z**2, weights), jnp.vdot(nll, weights)


def temporaries(device, width, dtype, implementation="auto"):
    """Returns the bytes of the gradient's temporaries at the size of a large model, as a share of
    float32 logits.
    """

    def loss(hidden, kernel, targets, weights):
        options = {"label_smoothing": 0.1, "implementation": implementation}
        return cross_entropy(with_z_loss, hidden, kernel, targets, weights, **options)[0]

    shapes = (
        ((TOKENS, width), dtype),
        ((width, VOCABULARY), jnp.float32),
        ((TOKENS,), jnp.int32),
        ((TOKENS,), jnp.float32),
    )
    arguments = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
    compiled = compile_on(device, jax.grad(loss, argnums=(0, 1)), *arguments)
    return compiled.memory_analysis().temp_size_in_bytes / (4 * TOKENS * VOCABULARY)


@pytest.mark.fast_cases(
    *(f"{name}-512-{dtype}" for name in ("fused", "chunked") for dtype in ("float32", "bfloat16"))
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [512, 1024])
@pytest.mark.parametrize("implementation", ["fused", "chunked"])
def test_temporaries_are_under_a_twentieth_of_the_logits(implementation, width, dtype):
    assert temporaries(jax.devices()[0], width, dtype, implementation) < 0.05


@pytest.mark.compilers
def test_temporaries_are_as_small_on_tpu():
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    # Of the generations the one that takes the most.
    assert temporaries(tpu_devices("v5p")[0], 1024, jnp.bfloat16) < 0.05


@pytest.mark.compilers
def test_temporaries_are_as_small_on_gpu(h200):
    assert temporaries(h200, 1024, jnp.bfloat16) < 0.05


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

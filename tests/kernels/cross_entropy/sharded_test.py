"""Cross-entropy on a mesh: equal to one device, and nothing large leaves its device."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from research.core.errors import UserError
from research.kernels.cross_entropy import cross_entropy, tiles
from tests.kernels.cross_entropy.cases import D, inputs, summed, value_and_gradients, weighted

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


@pytest.mark.parametrize("implementation", ["chunked", "fused"])
def test_gradient_of_a_bfloat16_kernel_is_summed_over_devices_in_float32(implementation):
    hidden, table, targets, cotangents = inputs((4, 16), vocab=64)
    table = table.astype(jnp.bfloat16)

    # The second four of eight devices take back nearly all that the first four give, so a sum of
    # rounded gradients would be nothing but their errors.
    hidden = jnp.concatenate([hidden, hidden])
    targets = jnp.concatenate([targets, targets])
    cotangents = tuple(jnp.concatenate([x, (2**-9 - 1) * x]) for x in cotangents)
    *_, expected = value_and_gradients(
        hidden, table.astype(jnp.float32), targets, cotangents, implementation="reference"
    )

    mesh, hidden, table = on_mesh("tokens twice, width", hidden, table)
    with jax.set_mesh(mesh):
        *_, found = value_and_gradients(
            hidden, table, targets, cotangents, implementation=implementation
        )
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.float32(found), expected, atol=0.01 * np.abs(expected).max())


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


TILE = 8


def loops_and_all(name):
    """Returns the collectives in the loops over tokens, those in the loops over the vocabulary, and
    all that there are.
    """
    hidden, table, targets, cotangents = inputs((16, 32), vocab=64)
    mesh, hidden, table = on_mesh(name, hidden, table)
    text = compiled_gradient(
        mesh, hidden, table, targets, cotangents, token_chunk=4, vocab_chunk=TILE
    )
    loop_bodies = set(re.findall(r"body=%?([\w.-]+)", text))
    assert len(loop_bodies) == 4, (
        "forward and backward, a loop over the vocabulary and in it one over tokens"
    )
    loops = [
        part for part in text.split("\n\n") if part.strip().split(" ")[0].lstrip("%") in loop_bodies
    ]
    outer = [part for part in loops if " while(" in part]
    inner = [part for part in loops if " while(" not in part]
    return collectives("\n".join(inner)), collectives("\n".join(outer)), collectives(text)


@pytest.mark.parametrize("name", MESHES)
def test_loops_over_tokens_send_nothing_and_those_over_the_vocabulary_a_tile_s_gradient(name):
    over_tokens, over_vocabulary, everywhere = loops_and_all(name)
    assert over_tokens == []
    # Of the width that a device keeps of the tile: a scatter where it keeps a part, and a sum.
    width = D // 2 if "width" in name else D
    kinds = ["reduce-scatter", "all-reduce"] if "width" in name else ["all-reduce"]
    assert over_vocabulary == [(kind, width * TILE) for kind in kinds]
    # The control: outside of loops is more than that.
    assert len(everywhere) > len(over_vocabulary)


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

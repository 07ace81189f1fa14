"""A model is served in the type that was asked for, bit for bit what was saved rounded to it, and
never held in another: claims about `training.checkpoint_shards`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.core.trees import named_leaves
from research.training import checkpoint_arrays, checkpoint_shards
from research.training.checkpoint_stream import write_params
from research.training.checkpoints import CheckpointConfig, Checkpoints
from tests.training.states import abstract, assert_same, new_state, params


def in_type(tree, dtype):
    """Shapes of a tree in one type, where they lie."""
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=leaf.sharding), tree
    )


def rounded(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def save(workdir, tree, how, step=1):
    if how == "whole":
        checkpoints = Checkpoints(workdir, CheckpointConfig(asynchronous=False))
        checkpoints.save(step, {"params": tree}, {})
        checkpoints.close()
        return
    named = named_leaves(tree)
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in named.items()}
    parts = [(name, (), np.asarray(leaf)) for name, leaf in named.items()]
    write_params(workdir, step, shapes, parts)


@pytest.fixture
def small_chunks(monkeypatch):
    """Arrays of several chunks, of which few are read ahead."""
    monkeypatch.setattr(checkpoint_arrays, "CHUNK_BYTES", 256)
    monkeypatch.setattr("research.training.checkpoint_stream.CHUNK_BYTES", 256)
    monkeypatch.setattr(checkpoint_shards, "LEAST_READ_AHEAD", 1024)


@pytest.mark.parametrize("how", ["whole", "in parts"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("sizes", [None, (2, 4), (1, 8)])
def test_what_is_served_is_what_was_saved_rounded_once(small_chunks, tmp_path, how, dtype, sizes):
    tree = params(seed=3, scanned=False)
    save(tmp_path, tree, how)
    for scanned in (False, True):
        same = params(seed=3, scanned=scanned)
        wanted = in_type(abstract(same), dtype)
        if sizes is not None:
            mesh = jax.make_mesh(sizes, ("fsdp", "tensor"))
            wanted = in_type(abstract(same, mesh, ("tensor",)), dtype)
        checkpoints = Checkpoints(tmp_path, CheckpointConfig())
        step, found = checkpoints.stream_params(abstract(same), wanted)
        assert step == 1
        assert_same(found, rounded(same, dtype))
        for leaf, shape in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
            assert leaf.sharding == shape.sharding


def test_averages_are_served_where_there_are_some(small_chunks, tmp_path, opened):
    state = new_state(ema=True)
    opened(asynchronous=False).save(4, state, {})
    wanted = in_type(abstract(state.params), "bfloat16")
    for fields, tree in ((("ema", "params"), state.ema), (("params",), state.params)):
        step, found = opened().stream_params(abstract(state.params), wanted, fields)
        assert step == 4
        assert_same(found, rounded(tree, "bfloat16"))


def test_a_digest_goes_by_what_the_parameters_are_and_not_by_where_they_lie(tmp_path, opened):
    def digest_of(folder: str, seed: int, step: int) -> bytes:
        save(tmp_path / folder, params(seed=seed, scanned=False), "whole", step)
        return Checkpoints(tmp_path / folder, CheckpointConfig()).params_digest(step)

    first = digest_of("first", seed=3, step=1)
    assert digest_of("second", seed=3, step=2) == first
    assert digest_of("third", seed=4, step=1) != first
    state = new_state(ema=True)
    opened(asynchronous=False).save(4, state, {})
    averages = opened().params_digest(4, ("ema", "params"))
    assert averages != opened().params_digest(4, ("params",))


def test_frozen_parameters_are_read_from_the_folder_that_checkpoints_share(tmp_path, opened):
    state = new_state(ema=True)
    checkpoints = opened(frozen=("embed",))
    checkpoints.save(1, state, {})
    checkpoints.wait()
    assert len(list((tmp_path / "checkpoints").glob("base-*"))) == 1
    wanted = in_type(abstract(state.params), "float32")
    _, found = opened().stream_params(abstract(state.params), wanted)
    assert_same(found, rounded(state.params, "float32"))


def damage(workdir, step, array):
    """Flips a bit of an array's that rounding to bfloat16 would lose."""
    raw = np.asarray(array).tobytes()
    folder = workdir / "checkpoints" / str(step) / "arrays"
    [path] = [path for path in folder.rglob("d/*") if raw in path.read_bytes()]
    data = bytearray(path.read_bytes())
    # The lowest bits of a float32 come first.
    data[data.index(raw) + 4 * 5] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_that_rounding_would_lose_is_found_and_the_one_before_is_taken(
    tmp_path, caplog
):
    first = params(seed=1, scanned=False)
    second = params(seed=2, scanned=False)
    save(tmp_path, first, "in parts", step=1)
    save(tmp_path, second, "in parts", step=2)
    kernel = second["layers_1"]["mlp"]["kernel"]
    damage(tmp_path, 2, kernel)
    wanted = in_type(abstract(first), "bfloat16")

    step, found = Checkpoints(tmp_path, CheckpointConfig()).stream_params(abstract(first), wanted)
    assert step == 1
    assert_same(found, rounded(first, "bfloat16"))
    assert "the bits of array params/layers/mlp/kernel are not those" in caplog.text

    damage(tmp_path, 1, first["layers_2"]["mlp"]["kernel"])
    with pytest.raises(UserError, match="no checkpoint is intact"):
        Checkpoints(tmp_path, CheckpointConfig()).stream_params(abstract(first), wanted)


def test_a_file_that_is_cut_is_damage(tmp_path):
    tree = params(seed=1, scanned=False)
    save(tmp_path, tree, "in parts")
    for path in (tmp_path / "checkpoints" / "1" / "arrays").rglob("d/*"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    wanted = in_type(abstract(tree), "bfloat16")
    with pytest.raises(UserError, match=r"no checkpoint is intact.* cannot be read"):
        Checkpoints(tmp_path, CheckpointConfig()).stream_params(abstract(tree), wanted)


def test_another_architecture_is_refused_by_what_was_saved(tmp_path):
    tree = params(seed=1, scanned=False)
    save(tmp_path, tree, "in parts")
    other = in_type(abstract(tree), "bfloat16")
    with pytest.raises(UserError, match=r"of another architecture: params/\S+ is float32"):
        Checkpoints(tmp_path, CheckpointConfig()).stream_params(other, other)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float32])
@pytest.mark.parametrize("shape", [(3, 5), (), (7,), (300, 700)])
def test_aligned_memory_is_taken_without_a_copy(shape, dtype):
    array = checkpoint_shards.aligned(shape, dtype)
    array[...] = 3
    device = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    found = jax.make_array_from_callback(shape, device, lambda _: array)
    assert found.unsafe_buffer_pointer() == array.ctypes.data
    assert bool((found == 3).all())

"""A checkpoint that was never whole in memory is like any other: claims about
`training.checkpoint_stream`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath

from research.core.trees import named_leaves
from research.models.canonical_params import canonical
from research.training import checkpoint_stream
from research.training.checkpoint_files import Damaged, read_manifest
from research.training.checkpoint_stream import ParamsReader, chunk_shape, write_params
from research.training.checkpoints import CheckpointConfig, Checkpoints
from tests.training.states import abstract, assert_same, new_state, params


def shapes_of(tree):
    return {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
        for name, leaf in named_leaves(tree).items()
    }


def parts_of(tree):
    """Whole parameters, but for the kernels, which come in halves and columns, last part first."""
    for name, leaf in reversed(named_leaves(tree).items()):
        value = np.asarray(leaf)
        if name.endswith("kernel"):
            for columns in (slice(16, 32), slice(0, 16)):
                for rows in (slice(0, 4), slice(4, 8)):
                    yield name, (rows, columns), value[rows, columns].copy()
        else:
            yield name, (), value


@pytest.fixture(scope="module")
def streamed(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("streamed")
    tree = params(seed=3, scanned=False)
    write_params(workdir, 5, shapes_of(tree), parts_of(tree))
    return workdir, tree


def test_what_is_streamed_is_restored_bitwise(streamed):
    workdir, tree = streamed
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    assert checkpoints.steps() == [5]
    step, restored = checkpoints.restore_params(abstract(tree))
    assert step == 5
    assert_same(restored, tree)


@pytest.mark.parametrize("sizes", [(8, 1), (2, 4), (1, 8)])
def test_it_is_restored_on_any_mesh(streamed, sizes):
    workdir, _ = streamed
    mesh = jax.make_mesh(sizes, ("fsdp", "tensor"))
    scanned = params(seed=3, scanned=True)
    wanted = abstract(scanned, mesh, ("fsdp", "tensor"))
    _, restored = Checkpoints(workdir, CheckpointConfig()).restore_params(wanted)
    assert_same(restored, scanned)
    assert len(restored["layers"]["mlp"]["kernel"].sharding.device_set) == 8


def test_its_manifest_is_that_of_a_checkpoint_saved_whole(streamed, tmp_path):
    workdir, tree = streamed
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(asynchronous=False))
    checkpoints.save(5, {"params": tree}, {})
    checkpoints.close()
    manifests = [read_manifest(folder / "checkpoints" / "5") for folder in (workdir, tmp_path)]
    assert manifests[0] == manifests[1]


def test_orbax_alone_reads_it(streamed):
    workdir, tree = streamed
    restored = ocp.PyTreeCheckpointer().restore(
        epath.Path(workdir / "checkpoints" / "5" / "arrays")
    )
    for name, wanted in canonical(tree).items():
        found = named_leaves(restored["params"])[name]
        np.testing.assert_array_equal(found, wanted, err_msg=name)


@pytest.mark.parametrize("fields", [("params",), ("ema", "params")])
def test_parts_of_any_checkpoint_are_read_and_checked(fields, tmp_path):
    state = new_state(ema=True)
    checkpoints = Checkpoints(tmp_path, CheckpointConfig(asynchronous=False))
    checkpoints.save(1, state, {})
    checkpoints.close()
    tree = getattr(state, fields[0])
    reader = ParamsReader(tmp_path, 1, shapes_of(tree), fields)
    for name, box, values in parts_of(tree):
        np.testing.assert_array_equal(reader.read(name, box), values, err_msg=name)
    reader.check()


def test_a_flipped_bit_is_found_when_all_is_read(tmp_path):
    tree = params(seed=3, scanned=False)
    write_params(tmp_path, 0, shapes_of(tree), parts_of(tree))
    raw = np.asarray(tree["layers_1"]["mlp"]["kernel"])[:4, :16].tobytes()
    [(path, data)] = [
        (path, data)
        for path in (tmp_path / "checkpoints" / "0" / "arrays" / "d").iterdir()
        if raw in (data := path.read_bytes())
    ]
    place = data.index(raw) + 7
    path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
    reader = ParamsReader(tmp_path, 0, shapes_of(tree))
    for name, box, _ in parts_of(tree):
        reader.read(name, box)
    with pytest.raises(Damaged, match="array params/layers/mlp/kernel are not those"):
        reader.check()


@pytest.mark.parametrize("after", [0, 3])
def test_a_failure_leaves_nothing(after, tmp_path):
    tree = params(seed=3, scanned=False)

    def failing():
        for count, part in enumerate(parts_of(tree)):
            if count == after:
                raise KeyboardInterrupt
            yield part

    with pytest.raises(KeyboardInterrupt):
        write_params(tmp_path, 0, shapes_of(tree), failing())
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_a_part_that_never_comes_is_an_error_and_leaves_nothing(tmp_path):
    tree = params(seed=3, scanned=False)
    with pytest.raises(AssertionError, match="every element"):
        write_params(tmp_path, 0, shapes_of(tree), list(parts_of(tree))[1:])
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    "part", [(1, 4096, 28672), (1, 4, 7168, 2048), (128256, 64), (1, 64), (1, 1, 1, 1), (1, 0, 3)]
)
def test_chunks_are_small_and_their_edges_are_those_of_parts(part, monkeypatch):
    chunk = chunk_shape(part, 4)
    assert 4 * np.prod(chunk) <= checkpoint_stream.CHUNK_BYTES
    for size, whole in zip(chunk, part, strict=True):
        assert size == max(whole, 1) or size & (size - 1) == 0
        if whole & (whole - 1) == 0 and whole:
            assert whole % size == 0


def test_bfloat16_is_kept(streamed):
    workdir, tree = streamed
    reader = ParamsReader(workdir, 5, shapes_of(tree))
    assert reader.read("embed", ()).dtype == jnp.bfloat16

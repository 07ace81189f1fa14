"""A model passes through in slices: claims about `interop.huggingface` and
`training.checkpoint_stream` together.
"""

import json
import tracemalloc

import jax
import numpy as np
import pytest
import safetensors.numpy

from research.core.errors import UserError
from research.core.trees import named_leaves
from research.interop import huggingface, mapping
from research.interop.architecture import choose
from research.interop.huggingface import (
    ARCHITECTURES,
    from_hugging_face,
    open_hugging_face,
    write_hugging_face,
)
from research.models.config import AttentionConfig, MlpConfig, ModelConfig
from research.training import checkpoint_stream
from research.training.checkpoint_stream import ParamsReader, write_params
from tests.interop import cases
from tests.interop.folders import golden_folder

MEGABYTE = 2**20
WIDE = ModelConfig(
    vocab_size=4096,
    num_layers=6,
    embed_dim=256,
    max_length=64,
    attention=AttentionConfig(num_heads=8, num_kv_heads=8, head_dim=32),
    mlp=MlpConfig(hidden_dim=1024),
)


def tensors_in(folder):
    return {
        name: value
        for path in folder.glob("*.safetensors")
        for name, value in safetensors.numpy.load_file(path).items()
    }


def sharded(folder, config, get_slice, dtype="float32", shard_bytes=50_000):
    architecture, fields = choose(ARCHITECTURES.values(), config)
    write_hugging_face(architecture, fields, config, get_slice, folder, {}, dtype, shard_bytes)
    return folder


@pytest.mark.parametrize("name", ["gpt2-small", "llama-2-70b"])
def test_from_shards_through_a_checkpoint_into_shards_is_bitwise(name, tmp_path):
    config, params = from_hugging_face(golden_folder(tmp_path, name))
    source = sharded(tmp_path / "source", config, mapping.slice_getter(config, params))
    assert len(list(source.glob("*.safetensors"))) > 3
    shapes = mapping.unrolled_shapes(config)
    write_params(tmp_path / "workdir", 0, shapes, open_hugging_face(source).weights.slices(5000))
    reader = ParamsReader(tmp_path / "workdir", 0, shapes)
    back = sharded(tmp_path / "back", config, reader.read, shard_bytes=70_000)
    reader.check()
    found, wanted = tensors_in(back), cases.weights(cases.stored()[name]["tensors"])
    assert found.keys() == wanted.keys() == tensors_in(source).keys()
    for tensor in wanted:
        np.testing.assert_array_equal(found[tensor], wanted[tensor], err_msg=tensor)
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in wanted.values())
    for path in back.glob("*.safetensors"):
        written = safetensors.numpy.load_file(path)
        assert all(index["weight_map"][tensor] == path.name for tensor in written)
        assert sum(value.nbytes for value in written.values()) <= 70_000


def test_bfloat16_is_written_when_asked_for_and_comes_back(tmp_path):
    config, params = from_hugging_face(golden_folder(tmp_path, "llama-1-7b"))
    folder = sharded(tmp_path / "bf16", config, mapping.slice_getter(config, params), "bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    found = tensors_in(folder)
    for name, value in cases.weights(cases.stored()["llama-1-7b"]["tensors"]).items():
        np.testing.assert_array_equal(found[name], value.astype(found[name].dtype))
        assert found[name].dtype.name == "bfloat16"
    again = sharded(
        tmp_path / "again", config, mapping.slice_getter(*from_hugging_face(folder)), "bfloat16"
    )
    for name, value in tensors_in(again).items():
        np.testing.assert_array_equal(value, found[name])


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder of a model of some size, and that size."""
    shapes = {name: shape.shape for name, shape in mapping.unrolled_shapes(WIDE).items()}
    folder = tmp_path_factory.mktemp("wide") / "source"
    sharded(
        folder,
        WIDE,
        lambda name, box: np.ones(shapes[name], np.float32)[box],
        shard_bytes=20 * MEGABYTE,
    )
    return folder, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def peak_of(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_a_few_pieces(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_stream, "MAX_PENDING_BYTES", 2 * MEGABYTE)
    folder, size = wide
    assert size > 32 * MEGABYTE
    shapes, bound = mapping.unrolled_shapes(WIDE), size / 3

    def bring_in():
        write_params(tmp_path, 0, shapes, open_hugging_face(folder).weights.slices(MEGABYTE))

    def bring_out():
        reader = ParamsReader(tmp_path, 0, shapes)
        mappings = mapping.map_tensors(ARCHITECTURES["llama"], WIDE)
        for _ in mapping.tensor_rows(mappings, reader.read, np.float32, MEGABYTE):
            pass
        reader.check()

    assert peak_of(bring_in) < bound
    assert peak_of(bring_out) < bound
    # The control: in memory it is the whole model.
    assert peak_of(lambda: list(open_hugging_face(folder).weights.slices(MEGABYTE))) > size / 2


def refused(folder):
    with pytest.raises(UserError) as error:
        open_hugging_face(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def indexed(tmp_path):
    """Writes an index beside the only file of a golden model, which it may name as
    `whole.safetensors`.
    """

    def write(places):
        folder = golden_folder(tmp_path, "llama-1-7b")
        (folder / "model.safetensors").rename(folder / "whole.safetensors")
        (tmp_path / "outside.safetensors").write_bytes((folder / "whole.safetensors").read_bytes())
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        return folder

    return write


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "..",
        "sub/x.safetensors",
        "gone",
        "",
        "a\0b",
        "x" * 300,
    ],
)
def test_an_index_names_files_of_its_folder_only(name, indexed):
    said = refused(indexed({"model.norm.weight": name}))
    assert "is not a file of this folder" in said
    assert len(said) < 400


def test_an_index_that_is_wrong_about_a_file_is_refused(indexed):
    folder = indexed({"model.norm.weight": "whole.safetensors", "elsewhere": "whole.safetensors"})
    assert "not in the files that it names: 'elsewhere'" in refused(folder)


def test_long_lists_of_an_index_are_cut_with_their_count(indexed):
    gone = refused(indexed({f"x{i}": f"{i}.safetensors" for i in range(1000)}))
    assert "… (1,000 in all) is not a file of this folder" in gone
    lost = refused(indexed(dict.fromkeys((f"x{i}" for i in range(1000)), "whole.safetensors")))
    assert lost.endswith("… (1,000 in all).")
    assert max(len(gone), len(lost)) < 600


def test_thousands_of_tensors_too_many_are_one_short_line(tmp_path):
    folder = golden_folder(tmp_path, "llama-1-7b")
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    tensors |= {f"extra.{i}": np.zeros(1, np.float32) for i in range(2_000)}
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    said = refused(folder)
    assert "extra.0 is not known; " in said
    assert said.endswith("… (2,000 in all).")
    assert len(said) < 800


@pytest.mark.parametrize(
    "stale", [{"model.norm.weight": "model-00001-of-00002.safetensors"}, "no map"]
)
def test_a_single_file_wins_over_an_index_that_a_larger_model_left_behind(stale, tmp_path, caplog):
    folder = golden_folder(tmp_path, "llama-1-7b")
    wanted = tensors_in(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": stale}))
    config, params = from_hugging_face(folder)  # an index alone, whose files are gone
    assert "model.safetensors is there, and has all weights" in caplog.text
    other = {name: value + 1 for name, value in wanted.items()}
    safetensors.numpy.save_file(other, folder / "model-00001-of-00002.safetensors")
    _, again = from_hugging_face(folder)  # and with older weights in a file that it names
    for found in (params, again):
        written = mapping.tensor_rows(
            mapping.map_tensors(ARCHITECTURES["llama"], config),
            mapping.slice_getter(config, found),
            "f4",
        )
        for name, rows in written:
            np.testing.assert_array_equal(rows.reshape(-1), wanted[name].reshape(-1), err_msg=name)


def test_weights_from_before_are_replaced_whatever_their_files(tmp_path):
    config, params = from_hugging_face(golden_folder(tmp_path, "llama-1-7b"))
    other = jax.tree.map(lambda x: x + 1, params)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.safetensors").write_bytes(b"")  # not of a model that was saved here
    for written, shard_bytes in (
        (other, 50_000),
        (params, 10**9),
        (other, 70_000),
        (params, 50_000),
    ):
        folder = sharded(
            tmp_path / "out", config, mapping.slice_getter(config, written), shard_bytes=shard_bytes
        )
        found = named_leaves(from_hugging_face(folder)[1])
        for name, value in named_leaves(written).items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
        index = folder / "model.safetensors.index.json"
        files = (
            set(json.loads(index.read_text())["weight_map"].values())
            if index.exists()
            else {"model.safetensors"}
        )
        assert {path.name for path in folder.glob("*.safetensors")} == files | {"mine.safetensors"}


def test_an_unknown_architecture_is_named_and_the_known_are_listed(tmp_path):
    folder = golden_folder(tmp_path, "llama-1-7b")
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"model_type": "mamba"}))
    said = refused(folder)
    assert "model_type = 'mamba' is not supported" in said
    assert all(known in said for known in huggingface.ARCHITECTURES)


def test_pickles_are_never_opened(tmp_path, monkeypatch):
    folder = golden_folder(tmp_path, "llama-1-7b")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (folder / "pytorch_model.bin").chmod(0)
    assert "pytorch_model.bin is pickled" in refused(folder)

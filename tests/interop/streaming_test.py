"""A model passes through in pieces: claims about `interop.huggingface` and `training.checkpoint_stream` together."""

import json
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy

from research.core.errors import UserError
from research.interop import huggingface, mapping
from research.interop.architecture import choose
from research.interop.huggingface import ARCHITECTURES, from_hugging_face, open_hugging_face, write_hugging_face
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


def sharded(folder, config, read, dtype="float32", shard_bytes=50_000):
    architecture, fields = choose(ARCHITECTURES.values(), config)
    write_hugging_face(architecture, fields, config, read, folder, {}, dtype, shard_bytes)
    return folder


@pytest.mark.parametrize("name", ["gpt2-small", "llama-2-70b"])
def test_from_shards_through_a_checkpoint_into_shards_is_bitwise(name, tmp_path):
    config, params = from_hugging_face(golden_folder(tmp_path, name))
    source = sharded(tmp_path / "source", config, mapping.reader(config, params))
    assert len(list(source.glob("*.safetensors"))) > 3
    shapes = mapping.unrolled_shapes(config)
    write_params(tmp_path / "workdir", 0, shapes, open_hugging_face(source).source.pieces(5000))
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
        held = safetensors.numpy.load_file(path)
        assert all(index["weight_map"][tensor] == path.name for tensor in held)
        assert sum(value.nbytes for value in held.values()) <= 70_000


def test_bfloat16_is_written_when_asked_for_and_comes_back(tmp_path):
    config, params = from_hugging_face(golden_folder(tmp_path, "llama-1-7b"))
    folder = sharded(tmp_path / "bf16", config, mapping.reader(config, params), "bfloat16")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    found = tensors_in(folder)
    for name, value in cases.weights(cases.stored()["llama-1-7b"]["tensors"]).items():
        np.testing.assert_array_equal(found[name], value.astype(found[name].dtype))
        assert found[name].dtype.name == "bfloat16"
    again = sharded(tmp_path / "again", config, mapping.reader(*from_hugging_face(folder)), "bfloat16")
    for name, value in tensors_in(again).items():
        np.testing.assert_array_equal(value, found[name])


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A folder of a model of some size, and that size."""
    shapes = {name: shape.shape for name, shape in mapping.unrolled_shapes(WIDE).items()}
    folder = tmp_path_factory.mktemp("wide") / "source"
    sharded(folder, WIDE, lambda name, box: np.ones(shapes[name], np.float32)[box], shard_bytes=20 * MEGABYTE)
    return folder, sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def peak_of(work):
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_a_few_pieces(wide, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_stream, "_IN_FLIGHT", 2 * MEGABYTE)
    folder, size = wide
    assert size > 32 * MEGABYTE
    shapes, bound = mapping.unrolled_shapes(WIDE), size / 3

    def bring_in():
        write_params(tmp_path, 0, shapes, open_hugging_face(folder).source.pieces(MEGABYTE))

    def bring_out():
        reader = ParamsReader(tmp_path, 0, shapes)
        placed = mapping.placements(ARCHITECTURES["llama"], WIDE)
        for _ in mapping.write(placed, reader.read, np.float32, MEGABYTE):
            pass
        reader.check()

    assert peak_of(bring_in) < bound
    assert peak_of(bring_out) < bound
    # The control: in memory it is the whole model.
    assert peak_of(lambda: list(open_hugging_face(folder).source.pieces(MEGABYTE))) > size / 2


def refused(folder):
    with pytest.raises(UserError) as error:
        open_hugging_face(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/etc/passwd", "..", "sub/x.safetensors", "gone", "", "a\0b"]
)
def test_an_index_names_files_of_its_folder_only(name, tmp_path):
    folder = golden_folder(tmp_path, "llama-1-7b")
    (tmp_path / "outside.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    assert "is not a file of this folder" in refused(folder)


def test_an_index_that_is_wrong_about_a_file_is_refused(tmp_path):
    folder = golden_folder(tmp_path, "llama-1-7b")
    places = {"model.norm.weight": "model.safetensors", "elsewhere": "model.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    assert "not in the files that it names: elsewhere" in refused(folder)


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

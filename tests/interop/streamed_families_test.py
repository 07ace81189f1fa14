"""`tessera convert` moves every kind of tensor a slice at a time: experts, latents, columns in
another order.
"""

import json

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import models, pre_tokenizers

import research
from research.core.trees import named_leaves
from research.interop import mapping
from research.interop.huggingface import from_hugging_face, open_hugging_face
from research.recipes.convert import convert
from tests.interop import cases
from tests.interop.folders import golden_folder


@pytest.fixture(params=["mixtral", "gpt-oss", "deepseek-v3"])
def folder(request, tmp_path):
    """A golden folder with a tokenizer."""
    path = golden_folder(tmp_path, request.param)
    words = {f"w{i}": i for i in range(cases.VOCAB)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def test_there_and_back_is_bitwise(folder, tmp_path):
    convert(str(folder), str(tmp_path / "workdir"), None, None)
    config, params = from_hugging_face(folder)
    model = research.load(tmp_path / "workdir")
    assert model.config == config
    found = named_leaves(model.params)
    for name, value in named_leaves(params).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    convert(str(tmp_path / "workdir"), str(tmp_path / "out"), "hf", None)
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    wanted = safetensors.numpy.load_file(folder / "model.safetensors")
    assert set(written) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)
    kinds = [
        json.loads((each / "config.json").read_text())["model_type"]
        for each in (folder, tmp_path / "out")
    ]
    assert kinds[0] == kinds[1]


def test_small_slices_make_the_same_whole(folder):
    """So small that all tensors that can be cut are."""
    model = open_hugging_face(folder)
    slices = list(model.weights.slices(limit=2**9))
    assert any(each.slices for each in slices)
    wanted = dict(named_leaves(from_hugging_face(folder)[1]))
    for name, value in named_leaves(mapping.params_from_slices(model.config, slices)).items():
        np.testing.assert_array_equal(value, wanted[name], err_msg=name)
    parts: dict[str, list[np.ndarray]] = {}
    get_slice = mapping.slice_getter(model.config, mapping.params_from_slices(model.config, slices))
    for name, rows in mapping.tensor_rows(
        model.weights.mappings, get_slice, np.float32, limit=2**9
    ):
        parts.setdefault(name, []).append(rows.reshape(-1))
    for name, value in safetensors.numpy.load_file(folder / "model.safetensors").items():
        np.testing.assert_array_equal(np.concatenate(parts[name]), value.reshape(-1), err_msg=name)

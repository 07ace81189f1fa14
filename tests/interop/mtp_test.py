"""Multi-token prediction, against goldens of transformers' own: logits, gradients, the layout of
tensors.
"""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy
import tokenizers
from tokenizers import models

import research
from research.core.errors import UserError
from research.core.trees import named_leaves
from research.interop import mapping
from research.interop.huggingface import open_hugging_face, to_hugging_face
from research.recipes.convert import convert
from tests.interop import cases, mtp_cases, registry
from tests.interop.folders import write_folder

FIRST = "model.layers.2."


@pytest.mark.thorough
def test_the_order_of_the_joined_inputs_is_seen_by_the_comparison():
    config, params, _ = mtp_cases.model()
    kernel = params["future_0"]["projection"]["kernel"]
    swapped = {"kernel": np.roll(kernel, len(kernel) // 2, axis=0)}
    logits = mtp_cases.logits(
        config, params | {"future_0": params["future_0"] | {"projection": swapped}}
    )
    off = [
        registry.off_by({**registry.ours(registry.MTP)[0], f"depth_{i}": each}, registry.MTP)
        for i, each in enumerate(logits, 1)
    ]
    assert min(off) > 1e-2  # the second one reads what the first one gives


@pytest.mark.thorough
def test_another_weight_of_a_predictor_is_seen_by_the_comparison():
    found = registry.ours(registry.MTP)[1]
    larger = {
        name: value * 1.01 if name.startswith(FIRST) else value for name, value in found.items()
    }
    assert registry.facts_off_by(larger, registry.MTP) > 10 * registry.GRADIENTS


def test_the_command_takes_them_there_and_back_bitwise(tmp_path):
    """Copies are read twice of a workdir, and count once for its digests."""
    _, params, tensors = mtp_cases.model()
    folder = write_folder(tmp_path / "in", mtp_cases.stored()["config"], tensors)
    words = models.WordLevel({f"w{i}": i for i in range(cases.VOCAB)}, unk_token="w0")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    convert(str(folder), str(tmp_path / "workdir"), None, None)
    found = named_leaves(research.load(tmp_path / "workdir").params)
    for name, value in named_leaves(params).items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
    convert(str(tmp_path / "workdir"), str(tmp_path / "out"), "hf", None)
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value, err_msg=name)


def opened(folder, tensors, **fields):
    """The model of a folder of these tensors, and its parameters."""
    model = open_hugging_face(write_folder(folder, mtp_cases.stored()["config"] | fields, tensors))
    return model.config, mapping.params_from_slices(model.config, model.weights.slices())


def test_copies_may_be_missing(tmp_path):
    config, params, tensors = mtp_cases.model()
    found, read = opened(tmp_path, mtp_cases.without_copies(tensors))
    assert found == config
    for name, value in named_leaves(params).items():
        np.testing.assert_array_equal(named_leaves(read)[name], value, err_msg=name)


@pytest.mark.parametrize(("copy", "original"), mtp_cases.COPIES.items())
def test_a_copy_with_other_numbers_is_refused_in_one_line(copy, original, tmp_path):
    _, _, tensors = mtp_cases.model()
    other = tensors[original].copy()
    other[3, 4] += 1
    with pytest.raises(
        UserError, match=f"{FIRST}{copy} differs from {original}, which it repeats.$"
    ) as error:
        opened(tmp_path, tensors | {FIRST + copy: other})
    assert "\n" not in str(error.value)


def test_layers_that_are_counted_and_not_there_are_left_out(tmp_path, caplog):
    """As transformers saves them."""
    config, params, tensors = mtp_cases.model()
    caplog.set_level("INFO", logger="tessera")
    main = {
        name: value
        for name, value in tensors.items()
        if not name.startswith((FIRST, "model.layers.3."))
    }
    found, read = opened(tmp_path, main)
    assert "num_nextn_predict_layers = 2 is left out" in caplog.text
    assert found == dataclasses.replace(config, head=dataclasses.replace(config.head, mtp_depth=0))
    assert set(named_leaves(read)) == {
        name for name in named_leaves(params) if not name.startswith("future")
    }


def test_what_one_of_them_lacks_and_what_is_too_many_is_named(tmp_path):
    _, _, tensors = mtp_cases.model()
    lacking = {
        name: value for name, value in tensors.items() if name != "model.layers.3.eh_proj.weight"
    }
    with pytest.raises(UserError, match=r"model\.layers\.3\.eh_proj\.weight is missing"):
        opened(tmp_path / "lacking", lacking)
    with pytest.raises(UserError, match=r"model\.layers\.3\.eh_proj\.weight is not known"):
        opened(tmp_path / "counted", tensors, num_nextn_predict_layers=1)


def test_copies_of_a_tied_model_are_all_its_embedding(tmp_path):
    config, params, _ = mtp_cases.model()
    tied = dataclasses.replace(config, tied_embeddings=True)
    to_hugging_face(
        tied, {name: value for name, value in params.items() if name != "unembed"}, tmp_path
    )
    written = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    for name in (f"{FIRST}embed_tokens.weight", "model.layers.3.shared_head.head.weight"):
        np.testing.assert_array_equal(written[name], written["model.embed_tokens.weight"])
    assert "lm_head.weight" not in written
    assert (
        json.loads((tmp_path / "config.json").read_text())["num_nextn_predict_layers"]
        == mtp_cases.DEPTH
    )
    assert open_hugging_face(tmp_path).config == tied

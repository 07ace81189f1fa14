"""Folders of Hugging Face: claims about `interop.huggingface` and the architectures."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from research.core.errors import UserError
from research.core.trees import named_leaves
from research.interop.architecture import choose, config_from, fields_from
from research.interop.gpt2 import GPT2
from research.interop.huggingface import from_hugging_face, to_hugging_face
from research.interop.llama import LLAMA
from research.interop.mapping import params_from, tensors_from
from research.models.config import NormConfig, PositionConfig
from tests.interop import cases
from tests.interop.folders import golden_folder, write_folder

GPT, LLAMA_1, STRETCHED, TIED = "gpt2-small", "llama-1-7b", "llama-3.1-8b", "llama-3.2-1b"


@pytest.mark.parametrize("name", cases.CASES)
def test_preset_is_what_the_config_file_says(name):
    architecture = GPT2 if name.startswith("gpt2") else LLAMA
    read = config_from(architecture, cases.stored()[name]["config"])
    assert dataclasses.replace(read, dropout=0.0) == cases.CASES[name].config()


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name in wanted:
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("name", [GPT, TIED])
def test_ids_of_tokens_go_out_and_the_rest_comes_back(name, tmp_path):
    config, params = from_hugging_face(golden_folder(tmp_path, name))
    to_hugging_face(config, params, tmp_path / "out", {"bos": 1, "eos": 2, "pad": None})
    written = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    assert_same(written, cases.weights(cases.stored()[name]["tensors"]))
    fields = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (fields["bos_token_id"], fields["eos_token_id"], fields["pad_token_id"]) == (1, 2, None)
    again, same = from_hugging_face(tmp_path / "out")
    assert again == config
    assert_same(named_leaves(same), named_leaves(params))


def test_both_spellings_of_rotary_scaling_are_read():
    new = cases.stored()[STRETCHED]["config"]
    rope = dict(new["rope_parameters"])
    old = {name: value for name, value in new.items() if name != "rope_parameters"}
    old |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    assert config_from(LLAMA, old) == config_from(LLAMA, new)


def test_biases_of_all_projections_are_read_and_written():
    fields = cases.stored()[LLAMA_1]["config"] | {"attention_bias": True, "mlp_bias": True}
    config = config_from(LLAMA, fields)
    shapes = dict(cases.stored()[LLAMA_1]["tensors"])
    shapes |= {
        name.replace("weight", "bias"): shape[:1]
        for name, shape in shapes.items()
        if "_proj" in name
    }
    tensors = cases.weights(shapes)
    assert_same(tensors_from(LLAMA, config, params_from(LLAMA, config, tensors)), tensors)


def test_names_without_prefix_and_buffers_are_read(tmp_path):
    stored = cases.stored()[GPT]
    tensors = cases.weights(stored["tensors"])
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    bare["h.0.attn.bias"] = np.tril(np.ones((1, 1, 32, 32), np.float32))
    config, params = from_hugging_face(write_folder(tmp_path, stored["config"], bare))
    assert_same(tensors_from(GPT2, config, params), tensors)


def test_a_copy_of_a_tied_embedding_is_read_only_where_it_is_one():
    stored = cases.stored()[TIED]
    config, tensors = config_from(LLAMA, stored["config"]), cases.weights(stored["tensors"])
    copy = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    assert_same(tensors_from(LLAMA, config, params_from(LLAMA, config, copy)), tensors)
    with pytest.raises(UserError, match="tie_word_embeddings"):
        params_from(LLAMA, config, {**copy, "lm_head.weight": copy["lm_head.weight"] + 1})


def test_bfloat16_in_several_files_is_read(tmp_path):
    stored = cases.stored()[LLAMA_1]
    tensors = {
        name: value.astype(jnp.bfloat16) for name, value in cases.weights(stored["tensors"]).items()
    }
    folder = golden_folder(tmp_path, LLAMA_1)
    (folder / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        safetensors.numpy.save_file({name: tensors[name] for name in part}, folder / file)
        places |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    config, params = from_hugging_face(folder)
    found = tensors_from(LLAMA, config, params)
    assert_same(found, {name: value.astype(np.float32) for name, value in tensors.items()})


def test_all_wrong_tensors_are_named_at_once():
    stored = cases.stored()[LLAMA_1]
    tensors = cases.weights(stored["tensors"])
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:3]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.int8)
    tensors["model.layers.7.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    with pytest.raises(UserError) as error:
        params_from(LLAMA, config_from(LLAMA, stored["config"]), tensors)
    for fault in (
        "model.norm.weight has the shape [3], not [64]",
        "model.layers.1.mlp.up_proj.weight is missing",
        "lm_head.weight has the type int8",
        "model.layers.7.mlp.up_proj.weight is not known",
    ):
        assert fault in str(error.value)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (LLAMA_1, {"model_type": "mamba"}, "model_type = 'mamba' is not supported"),
        (LLAMA_1, {"model_type": ["llama"]}, "model_type = ['llama'] is not supported"),
        (LLAMA_1, {"num_hidden_layers": 9_999}, "0 tensors are none of 9,999 layers"),
        (
            "mixtral",
            {"num_hidden_layers": 10**9},
            "num_hidden_layers = 1000000000 must be a whole number of at least 1 and",
        ),
        (
            LLAMA_1,
            {"rope_parameters": {"rope_type": "ntk", "rope_theta": 1e4}},
            "rope_type = 'ntk' is not supported",
        ),
        (
            LLAMA_1,
            {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            "of rope_type = 'llama3' is missing",
        ),
        (
            LLAMA_1,
            {"rope_parameters": {"partial_rotary_factor": 0.5}},
            "partial_rotary_factor = 0.5",
        ),
        (LLAMA_1, {"sliding_window": 128}, "sliding_window = 128"),
        (LLAMA_1, {"quantization_config": {"bits": 4}}, "quantization_config"),
        (LLAMA_1, {"hidden_act": "mish"}, "hidden_act = 'mish' is not supported"),
        (LLAMA_1, {"hidden_size": "64"}, "hidden_size = '64' must be a whole number"),
        (LLAMA_1, {"vocab_size": 10**12}, "vocab_size = 1000000000000 must be a whole number"),
        (LLAMA_1, {"num_key_value_heads": 3}, "num_kv_heads = 3 does not divide"),
        (
            GPT,
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx = True is not supported",
        ),
        (GPT, {"scale_attn_weights": False}, "scale_attn_weights = False is not supported"),
        (GPT, {"embd_pdrop": 0.3}, "embd_pdrop = 0.3 must equal resid_pdrop"),
    ],
)
def test_a_feature_that_is_not_supported_is_named(name, fields, message, tmp_path):
    stored = cases.stored()[name]
    folder = write_folder(tmp_path, stored["config"] | fields, {})
    with pytest.raises(UserError) as error:
        from_hugging_face(folder)
    assert message in str(error.value)
    assert "config.json" in str(error.value)


def test_known_architectures_are_listed_once(tmp_path):
    for unknown in (None, "mamba"):  # one has a neighbour and one has not
        folder = write_folder(
            tmp_path, cases.stored()[LLAMA_1]["config"] | {"model_type": unknown}, {}
        )
        with pytest.raises(UserError) as error:
            from_hugging_face(folder)
        assert str(error.value).count("Known: bart, bert, ") == 1


def test_a_missing_field_is_named():
    fields = {
        name: value for name, value in cases.stored()[GPT]["config"].items() if name != "n_head"
    }
    with pytest.raises(UserError, match="n_head is missing"):
        config_from(GPT2, fields)


def test_broken_folders_are_refused_in_one_line(tmp_path):
    folder = golden_folder(tmp_path, LLAMA_1)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for content, message in (
        (whole[:-4], "cannot be read"),
        (b"\xff" * 64, "cannot be read"),
        (b"", "cannot be read"),
    ):
        weights.write_bytes(content)
        with pytest.raises(UserError, match=message):
            from_hugging_face(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is pickled"):
        from_hugging_face(folder)
    (folder / "pytorch_model.bin").rename(folder / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt is pickled"):
        from_hugging_face(folder)
    (folder / "model.pt").rename(folder / "pytorch_model.bin")
    shutil.copy(folder / "pytorch_model.bin", tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.norm.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="is not a file of this folder"):
        from_hugging_face(folder)
    index = {"weight_map": {"model.norm.weight": "pytorch_model.bin"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"'pytorch_model\.bin' is not a safetensors file"):
        from_hugging_face(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        from_hugging_face(folder)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"position": PositionConfig(kind="alibi")}, "position.kind"),
        ({"norm": NormConfig(placement="post")}, "norm.placement"),
        ({"scale_embeddings": True}, "scale_embeddings"),
    ],
)
def test_a_model_that_no_architecture_holds_is_refused_by_field(changes, field, tmp_path):
    config = dataclasses.replace(config_from(LLAMA, cases.stored()[LLAMA_1]["config"]), **changes)
    with pytest.raises(UserError, match=field):
        to_hugging_face(config, {}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=field):
        fields_from(LLAMA, config)


def test_of_many_refusals_the_nearest_are_shown():
    config = dataclasses.replace(
        config_from(LLAMA, cases.stored()[LLAMA_1]["config"]), scale_embeddings=True
    )
    many = [dataclasses.replace(GPT2, model_type=f"gpt{i}") for i in range(9)]
    with pytest.raises(UserError) as error:
        choose([*many, LLAMA], config)
    assert str(error.value).count(";") == 2
    assert "this model: scale_embeddings is not what 'llama' has; " in str(error.value)


def test_the_architecture_that_a_model_came_from_is_tried_first():
    config = config_from(LLAMA, cases.stored()[LLAMA_1]["config"])
    twin = dataclasses.replace(LLAMA, model_type="twin")
    assert choose([LLAMA, twin], config)[0] is LLAMA
    assert choose([LLAMA, twin], config, first="twin")[0] is twin
    assert choose([LLAMA, twin], config, first="gone")[0] is LLAMA

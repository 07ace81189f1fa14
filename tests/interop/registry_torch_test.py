"""The golden cases live, where torch is importable (extra `parity`): each gradient whole, and the
way back.
"""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")

from research.interop.architecture import fields_from  # noqa: E402
from research.interop.deepseek import DEEPSEEK_V3  # noqa: E402
from research.interop.huggingface import from_hugging_face, open_hugging_face, to_hugging_face  # noqa: E402
from research.interop.mapping import map_tensors, shapes_of  # noqa: E402
from research.models.config import LayerConfig  # noqa: E402
from tests.interop import (  # noqa: E402
    cases,
    mtp_cases,
    presets_references,
    registry,
    torch_models,
    torch_references,
)
from tests.interop.folders import TOLERANCE, logits_of, write_folder  # noqa: E402

pytestmark = pytest.mark.live


@pytest.mark.parametrize("name", registry.CASES)
def test_goldens_are_what_torch_computes_and_each_gradient_is_equal(name, tmp_path):
    suite = registry.CASES[name]
    if name not in registry.PRESET_CASES:
        description = json.loads(
            json.dumps([torch_references.write_seeded(name, tmp_path), registry.stored()[name]])
        )
        for each in description:
            each["config"].pop("transformers_version")
        assert description[0] == description[1]
    outputs, gradients = torch_references.compute(name, tmp_path)
    assert registry.off_by(outputs, name) < suite.logits
    assert (
        registry.norms_off_by(registry.ours(name)[1], gradients, suite.least) < registry.GRADIENTS
    )


@pytest.mark.parametrize("name", registry.stored())
def test_transformers_computes_the_same_with_what_is_written(name, tmp_path):
    case, suite = registry.model(name), registry.CASES[name]
    to_hugging_face(case.config, case.params, tmp_path, model_type=case.architecture.model_type)
    outputs, gradients = torch_references.compute(name, tmp_path)
    assert registry.off_by(outputs, name) < suite.logits
    assert registry.facts_off_by(gradients, name) < registry.GRADIENTS


def test_every_case_has_a_reference():
    assert presets_references.REFERENCES.keys() == registry.PRESET_CASES.keys()
    assert {*torch_models.MODELS, registry.MTP} == registry.stored().keys()


@pytest.mark.parametrize(
    "fields", [{"attn_factor": 0.878}, {"finetuned": True, "low_freq_factor": 1.0}]
)
def test_transformers_leaves_the_same_fields_of_a_scaling_out(fields, tmp_path):
    case, stored = registry.model("llama-yarn"), registry.stored()["llama-yarn"]["config"]
    rope = stored["rope_parameters"] | fields
    folder = write_folder(tmp_path, stored | {"rope_parameters": rope}, case.tensors)
    assert (
        registry.off_by(torch_references.compute("llama-yarn", folder)[0], "llama-yarn") < TOLERANCE
    )
    assert from_hugging_face(folder)[0] == case.config


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_transformers_ties_and_scales_a_t5_as_two_facts(tied, scaled, tmp_path):
    stored, tensors = registry.stored()["t5-1.1"]["config"], dict(registry.model("t5-1.1").tensors)
    if tied:
        del tensors["lm_head.weight"]
    folder = write_folder(tmp_path / "in", stored | {"scale_decoder_outputs": scaled}, tensors)
    wanted, _ = torch_references.compute("t5-1.1", folder)
    config, params = from_hugging_face(folder)
    found = registry.outputs("t5-1.1", config, params=params)
    np.testing.assert_allclose(
        found["logits"], wanted["logits"], atol=1e-5 * np.abs(wanted["logits"]).max()
    )
    to_hugging_face(config, params, tmp_path / "out", model_type="t5")
    again, _ = torch_references.compute("t5-1.1", tmp_path / "out")
    np.testing.assert_allclose(again["logits"], wanted["logits"], atol=1e-6)


@pytest.mark.parametrize("name", ["llama-2-70b", "qwen3-moe", "gpt-oss"])
def test_a_folder_that_transformers_saved_is_read(name, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        torch_models.DECODERS[name], attn_implementation="eager"
    )
    model.eval().save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    with torch.no_grad():
        wanted = model(torch.from_numpy(cases.tokens()).long()).logits.numpy()
    np.testing.assert_allclose(
        logits_of(*from_hugging_face(tmp_path), cases.tokens()), wanted, atol=TOLERANCE
    )


def test_the_text_of_a_model_that_sees_pictures_is_read(tmp_path, caplog):
    text = torch_models.DECODERS["gemma3"].to_dict()
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14}
    )
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(cases.tokens()).long()).logits.numpy()
    caplog.set_level("INFO", logger="tessera")
    config, params = from_hugging_face(tmp_path)
    assert "the vision model" in caplog.text
    np.testing.assert_allclose(logits_of(config, params, cases.tokens()), wanted, atol=TOLERANCE)
    to_hugging_face(config, params, tmp_path / "out", model_type="gemma3")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gemma3_text"
    weights = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    newer = {
        name.replace("language_model.model.", "model.language_model."): value
        for name, value in weights.items()
    }
    safetensors.numpy.save_file(newer, tmp_path / "model.safetensors")
    open_hugging_face(tmp_path)


def test_transformers_leaves_the_layer_of_a_model_as_deep_as_the_released_one_out(tmp_path):
    config = registry.model(registry.MTP).config
    shallow = {"num_layers": 61, "first_layers": (LayerConfig(experts=False),) * 58}
    config = dataclasses.replace(
        config, **shallow, head=dataclasses.replace(config.head, mtp_depth=1)
    )
    shapes = {
        name: list(shape) for name, shape in shapes_of(map_tensors(DEEPSEEK_V3, config)).items()
    }
    assert "model.layers.61.eh_proj.weight" in shapes
    write_folder(tmp_path, fields_from(DEEPSEEK_V3, config), mtp_cases.weights(shapes))
    _, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]

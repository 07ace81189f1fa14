"""The same claims live, where torch is importable (extra `parity`)."""

import json

import numpy as np
import pytest
import safetensors.numpy

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")

from research.interop.huggingface import from_hugging_face, open_hugging_face, to_hugging_face  # noqa: E402
from tests.interop import cases, make_goldens  # noqa: E402
from tests.interop.families_test import GRADIENTS, LOGITS, NAMES  # noqa: E402
from tests.interop.folders import TOLERANCE, golden_folder, logits_of  # noqa: E402

pytestmark = pytest.mark.live


@pytest.mark.parametrize("name", make_goldens.CONFIGS)
def test_goldens_are_what_torch_computes(name):
    description, logits, gradients = make_goldens.compute(make_goldens.CONFIGS[name])
    stored = cases.stored()[name]
    description, stored = json.loads(json.dumps([description, stored]))
    for fields in (description["config"], stored["config"]):
        fields.pop("transformers_version")
    assert description == stored
    assert cases.off_by(logits, name) < LOGITS
    np.testing.assert_allclose(gradients, cases.golden_gradients(name), atol=GRADIENTS * gradients[:, 0].max())


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_is_written(name, tmp_path):
    config, params = from_hugging_face(golden_folder(tmp_path, name))
    to_hugging_face(config, params, tmp_path / "out", model_type=cases.stored()[name]["config"]["model_type"])
    logits, gradients = make_goldens.logits_and_gradients(make_goldens.load(tmp_path / "out"))
    assert cases.off_by(logits, name) < LOGITS
    assert cases.gradients_off_by(gradients, name) < GRADIENTS


@pytest.mark.parametrize("name", ["llama-2-70b", "qwen3-moe", "gpt-oss"])
def test_a_folder_that_transformers_saved_is_read(name, tmp_path):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(make_goldens.CONFIGS[name], attn_implementation="eager")
    model.eval().save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    with torch.no_grad():
        wanted = model(torch.from_numpy(cases.tokens()).long()).logits.numpy()
    np.testing.assert_allclose(logits_of(*from_hugging_face(tmp_path), cases.tokens()), wanted, atol=TOLERANCE)


def test_the_text_of_a_model_that_sees_pictures_is_read(tmp_path, caplog):
    text = make_goldens.CONFIGS["gemma3"].to_dict()
    sight = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(text_config=text, vision_config=sight | {"image_size": 28, "patch_size": 14})
    model = transformers.AutoModelForImageTextToText.from_config(config).eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(input_ids=torch.from_numpy(cases.tokens()).long()).logits.numpy()
    caplog.set_level("INFO", logger="tessera")
    config, params = from_hugging_face(tmp_path)
    assert "what sees pictures" in caplog.text
    np.testing.assert_allclose(logits_of(config, params, cases.tokens()), wanted, atol=TOLERANCE)
    to_hugging_face(config, params, tmp_path / "out", model_type="gemma3")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "gemma3_text"
    weights = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    newer = {name.replace("language_model.model.", "model.language_model."): value for name, value in weights.items()}
    safetensors.numpy.save_file(newer, tmp_path / "model.safetensors")
    open_hugging_face(tmp_path)

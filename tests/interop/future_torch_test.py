"""The same claims live, where torch is importable (extra `parity`)."""

import dataclasses
import json

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
transformers = pytest.importorskip("transformers", reason="needs the extra `parity`")

from research.interop.architecture import fields_from  # noqa: E402
from research.interop.deepseek import DEEPSEEK_V3  # noqa: E402
from research.interop.huggingface import to_hugging_face  # noqa: E402
from research.interop.mapping import placements, shapes_of, tensors_from  # noqa: E402
from research.models.config import LayerConfig  # noqa: E402
from tests.interop import future_cases as future  # noqa: E402
from tests.interop import make_future_goldens as goldens  # noqa: E402
from tests.interop.folders import write_folder  # noqa: E402
from tests.interop.future_test import GRADIENTS, LOGITS  # noqa: E402

pytestmark = pytest.mark.live


def test_goldens_are_what_torch_computes_and_each_gradient_is_equal(tmp_path):
    description, stored = goldens.write_seeded(tmp_path), dict(future.stored())
    for fields in (description["config"], stored["config"]):
        fields.pop("transformers_version")
    assert json.loads(json.dumps(description)) == stored
    logits, wanted = goldens.compute(*goldens.load(tmp_path))
    for depth, found in enumerate(logits, 1):
        golden = future.golden()[f"depth_{depth}"]
        assert np.abs(found - golden).max() < LOGITS * np.abs(golden).max()
    gradients = tensors_from(DEEPSEEK_V3, future.model()[0], future.gradients())
    assert future.without_doubles(gradients).keys() == wanted.keys()
    largest = max(np.abs(value).max() for value in wanted.values())
    for name, value in wanted.items():
        # Experts that no token goes to have none.
        unit = max(np.abs(value).max(), 1e-6 * largest)
        assert np.abs(gradients[name] - value).max() < GRADIENTS * unit, name


def test_transformers_predicts_with_what_is_written(tmp_path):
    config, params, _ = future.model()
    to_hugging_face(config, params, tmp_path)
    logits, _ = goldens.compute(*goldens.load(tmp_path))
    for depth, found in enumerate(logits, 1):
        golden = future.golden()[f"depth_{depth}"]
        assert np.abs(found - golden).max() < LOGITS * np.abs(golden).max()


def test_transformers_leaves_the_layer_of_a_model_as_deep_as_the_released_one_out(tmp_path):
    config, _, _ = future.model()
    shallow = {"num_layers": 61, "first_layers": (LayerConfig(experts=False),) * 58}
    config = dataclasses.replace(config, **shallow, head=dataclasses.replace(config.head, num_future=1))
    shapes = {name: list(shape) for name, shape in shapes_of(placements(DEEPSEEK_V3, config)).items()}
    assert "model.layers.61.eh_proj.weight" in shapes
    write_folder(tmp_path, fields_from(DEEPSEEK_V3, config), future.weights(shapes))
    _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]

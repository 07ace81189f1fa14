"""The same claims live, where torch is importable (extra `parity`): each gradient whole, and the way back."""

import json

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `parity`")
pytest.importorskip("transformers", reason="needs the extra `parity`")

from research.interop.architecture import fields_from  # noqa: E402
from research.interop.huggingface import write_hugging_face  # noqa: E402
from research.interop.mapping import params_from, reader  # noqa: E402
from tests.interop import encoders_cases as encoders  # noqa: E402
from tests.interop import make_encoders_goldens as goldens  # noqa: E402
from tests.interop.encoders_test import GRADIENTS, LOGITS  # noqa: E402

pytestmark = pytest.mark.live


@pytest.mark.parametrize("name", goldens.MODELS)
def test_goldens_are_what_torch_computes_and_each_gradient_is_equal(name, tmp_path):
    description = goldens.write_seeded(name, tmp_path)
    stored = encoders.stored()[name]
    for fields in (description["config"], stored["config"]):
        fields.pop("transformers_version")
    assert json.loads(json.dumps(description)) == stored
    _, config, _ = encoders.model(name)
    outputs, gradients = goldens.compute(goldens.load(name, tmp_path), encoders.batch(name, config))
    for output, value in outputs.items():
        assert encoders.off_by(value, encoders.golden(name)[output]) < LOGITS
    _, found = encoders.ours(name)
    assert found.keys() == gradients.keys()
    off = encoders.norms_off_by(found, gradients)
    assert max(off.values()) < GRADIENTS, off
    logits_off = encoders.off_by(encoders.ours(name)[0]["logits"], outputs["logits"])
    print(f"{name}: logits {logits_off:.1e}, gradients {max(off.values()):.1e}")  # README's table


@pytest.mark.parametrize("name", goldens.MODELS)
def test_transformers_loads_what_is_written(name, tmp_path):
    architecture, config, tensors = encoders.model(name)
    read = reader(config, params_from(architecture, config, tensors))
    write_hugging_face(architecture, fields_from(architecture, config), config, read, tmp_path, {"pad": None})
    outputs, _ = goldens.compute(goldens.load(name, tmp_path), encoders.batch(name, config))
    assert encoders.off_by(outputs["logits"], encoders.golden(name)["logits"]) < LOGITS

"""The same claims live, where torch is importable (extra `parity`): each gradient whole."""

import pytest

pytest.importorskip("torch", reason="needs the extra `parity`")
pytest.importorskip("transformers", reason="needs the extra `parity`")

from tests.interop import encoders_cases, presets_cases, presets_references
from tests.interop.presets_test import GRADIENTS, LOGITS

pytestmark = pytest.mark.live


@pytest.mark.parametrize("name", presets_references.REFERENCES)
def test_goldens_are_what_torch_computes_and_each_gradient_is_equal(name):
    config = presets_cases.config(name)
    named, given = presets_cases.weights(config), presets_cases.batch(config)
    logits, wanted = presets_references.measured(presets_references.REFERENCES[name], config, named, given)
    found_logits, found = presets_cases.ours(name)
    assert encoders_cases.off_by(logits, presets_cases.golden(name)["logits"]) < LOGITS
    assert found.keys() == wanted.keys()
    off, logits_off = encoders_cases.norms_off_by(found, wanted), encoders_cases.off_by(found_logits, logits)
    print(f"{name}: logits {logits_off:.1e}, gradients {max(off.values()):.1e}")  # README's table
    assert logits_off < LOGITS
    assert max(off.values()) < GRADIENTS, off


def test_every_case_has_a_reference():
    assert presets_references.REFERENCES.keys() == presets_cases.CASES.keys()

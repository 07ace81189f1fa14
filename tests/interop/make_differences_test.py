"""The table of families: every golden case and every preset is in one row, and the file has these
rows.
"""

import json

from research.bench import report
from tests.interop import make_differences, registry
from tests.interop.cases import ROOT


def test_every_golden_case_and_every_preset_is_in_one_row():
    cases = [name for family in make_differences.FAMILIES for name in family.cases.split()]
    presets = [name for family in make_differences.FAMILIES for name in family.presets.split()]
    assert sorted(cases) == sorted(registry.CASES)
    assert sorted(presets) == sorted(
        path.stem for path in (ROOT / "configs" / "model").glob("[a-z]*.py")
    )


def test_the_file_has_a_row_a_family_and_no_difference_above_what_the_goldens_allow():
    held = json.loads((report.FIGURES / "families_torch.json").read_text())
    assert held["columns"] == make_differences.COLUMNS
    for (name, _, parts, logits, gradients), family in zip(
        held["rows"], make_differences.FAMILIES, strict=True
    ):
        assert (name, parts) == (family.name, family.parts)
        assert float(logits) < max(registry.CASES[case].logits for case in family.cases.split())
        assert float(gradients) < registry.GRADIENTS


def test_the_largest_difference_of_a_family_s_cases_is_shown(monkeypatch):
    outputs, gradients = {"a": 1e-7, "b": 3.04e-6}, {"a": 2e-5, "b": 1e-6}
    monkeypatch.setattr(registry, "ours", lambda name: (name, name))
    monkeypatch.setattr(registry, "off_by", lambda found, name: outputs[name])
    monkeypatch.setattr(registry, "facts_off_by", lambda found, name: gradients[name])
    family = make_differences.Family("A", "a b", "parts", "a b")
    assert make_differences.row(family) == ["A", "`a.py`, `b.py`", "parts", "3.0e-6", "2.0e-5"]

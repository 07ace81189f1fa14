"""Families whose presets no checkpoint of transformers holds: logits and gradients against goldens of its parts."""

import dataclasses

import numpy as np
import pytest

from research.models.config import LayerConfig, PositionConfig
from tests.interop import cases, encoders_cases, presets_cases
from tests.interop.encoders_test import changed, window

# In units of the largest logit, and of a gradient's norm.
LOGITS, GRADIENTS = 3e-5, 1e-4


@pytest.mark.parametrize("name", presets_cases.CASES)
def test_logits_and_gradients_equal_torch(name):
    (logits, gradients), wanted = presets_cases.ours(name), presets_cases.golden(name)
    assert np.abs(wanted["logits"]).max() > 0.1
    assert encoders_cases.off_by(logits, wanted["logits"]) < LOGITS
    assert encoders_cases.gradients_off_by(cases.facts(gradients), wanted["gradients"]) < GRADIENTS


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("transformer", lambda c: changed(c, position__halves=True)),
        ("transformer", lambda c: changed(c, scale_embeddings=False)),
        ("gpt-3", lambda c: window(c, 7)),
        ("gpt-3", lambda c: window(c, 9)),
        ("gpt-3", lambda c: changed(c, pattern=c.pattern[::-1])),
        ("gpt-3", lambda c: changed(c, pattern=(LayerConfig(),))),
        ("gopher", lambda c: changed(c, position=PositionConfig(kind="none"))),
        ("gopher", lambda c: changed(c, attention__scale=1.0)),
        ("prefix", lambda c: changed(c, position__max_distance=30)),
        *((name, lambda c: changed(c, structure="decoder")) for name in ("prefix", "prefix-llama", "prefix-gpt2")),
    ],
)
def test_another_model_is_seen_by_the_comparison(name, change):
    config = presets_cases.config(name)
    assert off_by(name, change(config), presets_cases.batch(config)) > 5 * LOGITS


@pytest.mark.parametrize("name", ["prefix", "prefix-llama", "prefix-gpt2"])
def test_a_prefix_of_one_token_more_or_less_is_seen_by_the_comparison(name):
    config, given = presets_cases.config(name), presets_cases.batch(presets_cases.config(name))
    for change in (-1, 1):
        lengths = given["prefix"].sum(axis=1, keepdims=True) + change
        other = given | {"prefix": (given["positions"] < lengths).astype(np.int32)}
        assert off_by(name, config, other) > 5 * LOGITS


def off_by(name, config, given):
    """How far the logits of another model, or of another batch, are from those of a case."""
    own = presets_cases.config(name)
    params = presets_cases.tree(own, presets_cases.weights(own))
    logits, _ = encoders_cases.logits_of(config, params, given)
    return encoders_cases.off_by(np.asarray(logits), presets_cases.golden(name)["logits"])


@pytest.mark.parametrize("name", ["transformer", "gpt-3", "gopher", "prefix"])
def test_a_case_is_its_preset_but_for_its_sizes(name):
    case = presets_cases.CASES[name]
    preset, shrunk = dataclasses.replace(case, shrink="").config(), presets_cases.config(name)
    for field in ("structure", "norm", "tied_embeddings", "scale_embeddings"):
        assert getattr(shrunk, field) == getattr(preset, field)
    assert shrunk.position.kind == preset.position.kind
    assert (shrunk.mlp.activation, shrunk.mlp.gated) == (preset.mlp.activation, preset.mlp.gated)
    assert [layer.window is None for layer in shrunk.pattern] == [layer.window is None for layer in preset.pattern]

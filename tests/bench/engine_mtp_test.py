"""The part `mtp` of `tessera bench engine`: what is measured, its rows, and what it refuses."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from research.bench import engine_mtp
from research.bench.acceptance import Text
from research.core import config as configs
from research.core.errors import UserError
from research.core.trees import named_leaves
from research.data.tokenizers import ByteTokenizer
from research.models.config import HeadConfig
from research.training.checkpoint_stream import write_params
from tests.models.variants import VARIANTS
from tests.tiny import random_params

CONFIG = dataclasses.replace(
    VARIANTS["latent"], vocab_size=260, max_length=128, head=HeadConfig(mtp_depth=1)
)


def write_workdir(folder, config):
    named = named_leaves(random_params(config))
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in named.items()}
    write_params(folder, 7, shapes, [(name, (), leaf) for name, leaf in named.items()])
    (folder / "config.json").write_text(json.dumps({"model": configs.plain(config)}))
    ByteTokenizer().save(folder / "tokenizer")
    return folder


@pytest.mark.thorough
def test_a_model_is_measured_with_its_own_guesses_and_without(tmp_path, monkeypatch):
    monkeypatch.setattr(engine_mtp, "PROMPTS", ("def f", "im"))
    monkeypatch.setattr(engine_mtp, "TOKENS", 32)
    short = {}
    for name, sampling in engine_mtp.SAMPLINGS.items():
        short[name] = dataclasses.replace(sampling, max_tokens=32)
    monkeypatch.setattr(engine_mtp, "SAMPLINGS", short)
    workdir = write_workdir(tmp_path / "model", CONFIG)
    found = engine_mtp.measure(1, workdir, workdir)
    assert found["step"] == 7
    for timed in found["timed"].values():
        assert timed["none"]["made"] == 0 < timed["mtp"]["made"]
        assert timed["mtp"]["tokens_a_step"] >= timed["none"]["tokens_a_step"]
    kept = found["acceptance"]
    # A draft model that is the model itself is always right.
    assert kept["a draft model"].same_noise == pytest.approx(1)
    assert kept["mtp"].guesses == 2 * engine_mtp.TOKENS
    for each in kept.values():
        assert 0 <= each.same_noise <= each.rejection + 1e-9 <= 1 + 2e-9
    rows = list(engine_mtp.rows_of(json.loads(json.dumps(found))))
    assert len(rows) == 2 + len(kept)


def test_rows_say_what_is_gained_and_kept():
    timed = {
        "none": {"seconds": [2.0, 4.0], "tokens_a_step": 1.0, "made": 0, "right": 0},
        "mtp": {"seconds": [1.0, 2.0], "tokens_a_step": 1.5, "made": 40, "right": 10},
    }
    acceptance = {"mtp": [0.3, 0.6, 100]}
    found = {"step": 7, "tokens": 30, "timed": {"greedy": timed}, "acceptance": acceptance}
    speed, kept = engine_mtp.rows_of(found)
    assert speed.ratio == "2.00 (2.00 to 2.00)"
    assert speed.measured == "20.0 tokens a second"
    assert "1.50 tokens a step; 10 of 40 guesses kept" in speed.also
    assert (kept.measured, kept.beside) == ("0.300", "rejection sampling 0.600")
    assert kept.ratio == "0.500"


def test_without_a_draft_model_its_row_is_left_out_by_name(tmp_path, monkeypatch):
    printed = json.dumps({"step": 1, "tokens": 1, "timed": {}, "acceptance": {}})
    monkeypatch.setattr(engine_mtp, "run", lambda command: printed)
    [row] = engine_mtp.mtp_rows(tmp_path, "runs/deepseek", None, 1)
    assert (row.beside, row.also) == ("left out", "no --draft_workdir says which")


def test_a_model_without_multi_token_prediction_is_refused(tmp_path):
    workdir = write_workdir(tmp_path, dataclasses.replace(CONFIG, head=HeadConfig()))
    with pytest.raises(UserError, match=r"--mtp_workdir = .* has a model without head.mtp_depth"):
        engine_mtp.measure(1, workdir)


def test_acceptances_are_of_the_tokens_that_were_drawn():
    params = random_params(CONFIG)
    ids = np.random.default_rng(0).integers(0, 260, 12).tolist()
    found = engine_mtp.acceptances(CONFIG, params, [Text(tuple(ids), 4)], 0.7, None)
    assert found["mtp"].guesses == found["first layers"].guesses == 8
    assert "a draft model" not in found

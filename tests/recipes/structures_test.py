"""One loop trains every structure: each objective's packed batches, resumed, sampled and read from
Python.
"""

import functools
import json
import pathlib

import numpy as np
import pytest

import research
from research.core.errors import UserError
from research.training.metrics import read_metrics
from tests.recipes import runs

ENCODER = {
    "model__structure": "encoder",
    "model__head__transform": True,
    "model__head__bias": True,
    "data__objective__kind": "masked",
    "data__tokenizer__mask": True,
}
BOTH = {
    "model__structure": "encoder_decoder",
    "model__encoder_layers": 2,
    "model__position__kind": "buckets",
    "model__decoder_start_id": 258,
}
EXPERTS = {"num_experts": 4, "experts_per_token": 2, "hidden_dim": 16, "balance_weight": 0.01}
CASES = {
    "masked": ENCODER,
    "prefix": {"model__structure": "prefix", "data__objective__kind": "prefix"},
    "span": {
        **BOTH,
        "data__objective__kind": "span",
        "data__tokenizer__sentinels": 8,
        "model__tied_embeddings": True,
        "optim__schedule__name": "constant",  # so that the number of steps decides no rate
    },
    "infill": {**BOTH, "data__objective__kind": "infill", "data__tokenizer__mask": True},
    "experts": {f"model__experts__{name}": value for name, value in EXPERTS.items()},
    "multi-token prediction": {"model__head__mtp_depth": 1},
}


def train(name: str, tiny: pathlib.Path, workdir: pathlib.Path, **more) -> None:
    runs.run(
        tiny, workdir, **CASES[name], **{"model__dropout": 0.0, "train__eval_every": 0, **more}
    )


def losses_of(workdir: pathlib.Path) -> list[float]:
    return [row["train/loss"] for row in read_metrics(workdir) if "train/loss" in row]


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    """Returns the workdir of a case, trained once for all tests here; nobody writes into it."""

    @functools.cache
    def workdir(name: str) -> pathlib.Path:
        path = tmp_path_factory.mktemp("finished") / "run"
        train(name, tiny, path)
        return path

    return workdir


@pytest.mark.fast_cases("span")
@pytest.mark.parametrize("name", CASES)
def test_loss_falls(name, finished):
    rows = read_metrics(finished(name))
    losses = losses_of(finished(name))
    assert len(losses) == runs.STEPS
    assert np.mean(losses[-3:]) < losses[0] - 0.3
    assert any("train/mtp_loss" in row for row in rows) == (name == "multi-token prediction")
    assert any("eval/loss" in row for row in rows)
    # Bits a byte mean something only where all of the text is predicted.
    predicts_all = name in ("experts", "multi-token prediction")
    assert any("eval/bits_per_byte" in row for row in rows) == predicts_all


def test_encoder_decoder_goes_on_where_it_was(tiny, tmp_path, finished):
    train("span", tiny, tmp_path / "parts", train__steps=8)
    train("span", tiny, tmp_path / "parts")
    assert losses_of(tmp_path / "parts") == losses_of(finished("span"))


def test_encoder_decoder_continues_prompts_and_gives_logits(finished):
    model = research.load(finished("span"))
    texts = model.generate(["the cat sat"], temperature=0.0, max_tokens=4)
    assert len(texts[0].tokens) <= 4
    logits = model.logits([[258, 5, 6]], encoder_tokens=[[5, 6, 7, 8]])
    assert logits.shape == (1, 3, model.config.vocab_size)
    other = model.logits([[258, 5, 6]], encoder_tokens=[[5, 6, 9, 8]])
    assert np.abs(logits - other).max() > 1e-6
    with pytest.raises(UserError, match="encoder_tokens"):
        model.logits([[258, 5, 6]])


@pytest.mark.thorough
def test_encoder_gives_logits_of_every_place_and_makes_no_text(finished):
    model = research.load(finished("masked"))
    assert model.logits([[5, 6, 7]]).shape == (1, 3, model.config.vocab_size)
    with pytest.raises(UserError, match=r"model\.structure = 'encoder' makes no text"):
        model.generate(["the cat"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data__objective__kind": "masked"},
            "does not train model.structure = 'decoder'. Use 'causal'.",
        ),
        ({**BOTH}, "does not train model.structure = 'encoder_decoder'. Use 'span' or"),
        (
            {**CASES["span"], "model__decoder_start_id": 3},
            "model.decoder_start_id = 3 is not the id",
        ),
        ({**CASES["span"], "data__tokenizer__sentinels": 0}, "sentinel_ids"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(changes, message, tiny, tmp_path):
    with pytest.raises(UserError, match=message):
        runs.run(tiny, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_run_of_a_config_with_fewer_fields_goes_on(tiny, tmp_path):
    whole = runs.run(tiny, tmp_path / "whole", train__eval_every=0)
    runs.run(tiny, tmp_path / "old", train__eval_every=0, train__steps=12)
    path = tmp_path / "old" / "config.json"
    values = json.loads(path.read_text())
    for group, name in (("model", "structure"), ("model", "pattern"), ("data", "objective")):
        del values[group][name]
    path.write_text(json.dumps(values))
    again = runs.run(tiny, tmp_path / "old", train__eval_every=0)
    assert int(again.step) == int(whole.step)

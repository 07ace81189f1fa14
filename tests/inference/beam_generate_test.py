"""Beams of a decoder: those of transformers, of each prompt by itself, as text."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import pytest

from research.core.errors import UserError
from research.data.tokenizers.byte import ByteTokenizer
from research.inference.answers import Beam
from research.inference.beam_config import BeamConfig
from research.inference.beam_generate import beam_generate
from research.inference.beam_search import Hypothesis
from research.inference.engine import Engine
from research.inference.generate import generate, serve_config
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.interop.huggingface import from_hugging_face
from research.interop.mapping import params_from
from research.models.config import ModelConfig
from tests.inference import beam_cases
from tests.interop import cases, registry
from tests.interop.folders import write_folder
from tests.tiny import logits, random_params, stack, tiny_config

BYTES = ByteTokenizer()
BEAMS = BeamConfig(num_beams=3, max_tokens=8, num_return=3)


@pytest.fixture(scope="module")
def model() -> tuple[ModelConfig, Any]:
    """A random model of bytes that is sure of itself."""
    config = tiny_config(vocab_size=BYTES.vocab_size, num_layers=1)
    params = random_params(config)
    params["final_norm"]["scale"] *= 4.0
    return config, params


def run(model: tuple[ModelConfig, Any], prompts: list[str], **fields) -> list[list[Beam]]:
    return beam_generate(*model, BYTES, prompts, dataclasses.replace(BEAMS, **fields))


class Ids(ByteTokenizer):
    """A tokenizer of the golden models' ids, which are no text."""

    def __init__(self, eos_id: int):
        super().__init__()
        self.vocab_size = cases.VOCAB
        self.eos_id = eos_id


def searched(
    model: tuple[ModelConfig, Any],
    prompts: Sequence[Sequence[int]],
    eos_id: int,
    grid: Sequence[BeamConfig],
) -> list[list[list[Beam]]]:
    """The beams of each prompt, by settings, all in one engine."""
    requests = [Request(tuple(ids), beams=beams) for beams in grid for ids in prompts]
    tokenizer = Ids(eos_id)
    serve = serve_config(model[0], requests, len(tokenizer.end_ids))
    answers = Engine(*model, tokenizer, serve).run(requests)
    found = iter(answer.beams for answer in answers)
    return [[next(found) for _ in prompts] for _ in grid]


def assert_equal(
    found: list[list[Beam]], wanted: list[list[Hypothesis]], beams: BeamConfig
) -> None:
    assert [[one.tokens for one in best] for best in found] == [
        [one.tokens for one in best] for best in wanted
    ]
    scores = [np.array([one.score for best in texts for one in best]) for texts in (found, wanted)]
    np.testing.assert_allclose(*scores, atol=1e-4, rtol=1e-6, err_msg=str(beams))


def golden_model(name: str, parent: Any) -> tuple[ModelConfig, Any]:
    return from_hugging_face(
        write_folder(parent / name, cases.stored()[name]["config"], beam_cases.tensors(name))
    )


@pytest.mark.fast_cases("llama-3.2-1b")
@pytest.mark.parametrize("name", beam_cases.MODELS)
def test_beams_equal_transformers(name, tmp_path):
    model = golden_model(name, tmp_path)
    found = searched(model, beam_cases.PROMPTS, beam_cases.MODELS[name][1], beam_cases.GRID)
    for texts, beams, wanted in zip(found, beam_cases.GRID, beam_cases.stored(name), strict=True):
        assert_equal(texts[: len(wanted)], wanted, beams)


@pytest.mark.fast_cases("marian")
@pytest.mark.parametrize("name", beam_cases.ENCODER_DECODERS)
def test_beams_of_encoder_decoders_equal_transformers(name):
    config = registry.model(name).config
    params = params_from(registry.model(name).architecture, config, beam_cases.tensors(name))
    grid = beam_cases.grid(name)
    config = dataclasses.replace(config, decoder_start_id=beam_cases.START)
    found = searched((config, params), beam_cases.SOURCES, beam_cases.eos_id(name), grid)
    for texts, beams, wanted in zip(found, grid, beam_cases.stored(name), strict=True):
        assert_equal(texts, wanted, beams)
    assert len({str([best[0].tokens for best in texts]) for texts in found}) > 6


@pytest.mark.parametrize("name", beam_cases.MODELS)
def test_goldens_tell_the_settings_apart(name):  # the control
    eos_id, stored = beam_cases.MODELS[name][1], beam_cases.stored(name)
    texts = {
        beams: [best[0].tokens for best in row]
        for beams, row in zip(beam_cases.GRID, stored, strict=True)
    }
    for field, values in (
        ("length_penalty", (0.0, 2.0)),
        ("early_stopping", (True, "never")),
        ("min_tokens", (0, 4)),
        ("forced_prefix", ((), (7, 50))),
    ):
        by_value = [
            {str(texts[beams]) for beams in texts if getattr(beams, field) == value}
            for value in values
        ]
        assert by_value[0] != by_value[1], field
    ended = [one.tokens[-1] == eos_id for row in stored for best in row for one in best]
    assert 0.2 < np.mean(ended) < 0.95
    assert len({str(text) for text in texts.values()}) > 20


def test_scanned_layers_give_the_same_beams(tmp_path):
    config, params = golden_model("llama-3.2-1b", tmp_path)
    scanned = (dataclasses.replace(config, layer_loop="scan"), stack(params, config.num_layers))
    grid = [beam_cases.GRID[13]]
    eos_id = beam_cases.MODELS["llama-3.2-1b"][1]
    [unrolled] = searched((config, params), beam_cases.PROMPTS, eos_id, grid)
    [found] = searched(scanned, beam_cases.PROMPTS, eos_id, grid)
    assert [[one.tokens for one in best] for best in found] == [
        [one.tokens for one in best] for best in unrolled
    ]


def test_one_beam_is_the_greedy_text_and_more_are_likelier(model):
    prompts = ["abc", "a longer prompt", "x"]
    greedy = generate(*model, BYTES, prompts, SamplingConfig(temperature=0.0, max_tokens=8))
    plain = {"min_tokens": 8, "length_penalty": 0.0, "num_return": 1}
    one, more = run(model, prompts, num_beams=1, **plain), run(model, prompts, num_beams=8, **plain)
    assert [best[0].text for best in one] == [text.text for text in greedy]
    assert [best[0].tokens for best in one] == [text.tokens for text in greedy]
    gains = [wide[0].score - narrow[0].score for wide, narrow in zip(more, one, strict=True)]
    assert min(gains) >= -1e-5
    assert max(gains) > 0.1


def test_beams_of_a_prompt_do_not_depend_on_the_batch(model):
    prompts = ["abc", "a much longer prompt than the first", "x"]
    for prompt, found in zip(prompts, run(model, prompts, no_repeat_ngram=2), strict=True):
        [alone] = run(model, [prompt], no_repeat_ngram=2)
        assert [one.tokens for one in alone] == [one.tokens for one in found]
        np.testing.assert_allclose(
            [one.score for one in alone], [one.score for one in found], atol=1e-5
        )


def test_another_prompt_has_other_beams(model):  # the control
    first, second = run(model, ["abc", "abd"])
    assert [one.tokens for one in first] != [one.tokens for one in second]


def test_forced_prefix_begins_every_text(model):
    for best in run(model, ["abc", "x"], forced_prefix=tuple(BYTES.encode("def "))):
        assert len(best) == 3
        assert all(one.text.startswith("def ") for one in best)


def test_forced_end_ends_every_text(model):
    free, forced = (run(model, ["abc"], forced_eos=wanted)[0] for wanted in (False, True))
    assert {one.finish for one in forced} == {"stop"}
    assert "length" in {one.finish for one in free}
    assert {one.tokens[-1] for one in forced} == {BYTES.eos_id}
    assert all(len(one.tokens) <= 8 for one in forced)


def test_any_end_id_ends_a_beam_whose_score_is_that_of_its_tokens(model, monkeypatch):
    config, params = model
    alone = {"num_beams": 1, "num_return": 1, "length_penalty": 0.0}
    [[free]] = run(model, ["abc"], **alone)
    end = free.tokens[2]
    assert end not in (*free.tokens[:2], BYTES.eos_id)
    monkeypatch.setattr(
        BYTES, "further_end_ids", (end, 9999)
    )  # one that the model has, and one that it has not
    [[found]] = run(model, ["abc"], **alone)
    assert (found.tokens, found.finish) == (free.tokens[:3], "stop")
    ids = [BYTES.bos_id, *b"abc", *found.tokens]
    log_p = jax.nn.log_softmax(logits(config, params, np.asarray([ids], np.int32))[0])
    wanted = sum(float(log_p[place - 1, ids[place]]) for place in range(4, 7))
    assert found.score == pytest.approx(wanted, abs=1e-4)


def test_what_cannot_be_searched_is_refused(model):
    for prompts, fields, said in (
        ([], {}, "prompts: at least one prompt is needed."),
        (
            ["a"],
            {"num_beams": 300},
            f"num_beams = 300 must be at most {BYTES.vocab_size}, the ids of the vocabulary.",
        ),
        (
            ["a" * 60],
            {},
            "max_tokens = 8 after a prompt of 61 tokens is more than the model's max_length = 64. "
            "Use at ",
        ),
        (["a" * 63], {}, "prompts: a prompt of 64 tokens leaves no room"),
    ):
        with pytest.raises(UserError) as caught:
            run(model, prompts, **fields)
        assert str(caught.value).startswith(said)


def test_empty_prompt_begins_a_document_or_is_refused(model, monkeypatch):
    assert len(run(model, [""])[0]) == 3
    monkeypatch.setattr(BYTES, "bos_id", None)
    monkeypatch.setattr(BYTES, "eos_id", None)
    with pytest.raises(UserError, match="prompts = '' is empty"):
        run(model, [""])

"""Guesses change no answer, whoever makes them, and are counted as they should be."""

import dataclasses
from typing import Any

import numpy as np
import pytest

from research.core.errors import UserError
from research.data.tokenizers import ByteTokenizer
from research.inference.engine import Engine
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.inference.speculation.gate import PAUSE, Gate
from research.inference.speculation.lookup import Lookup
from research.kernels.decode_attention import PAGE_SIZE
from research.models.config import HeadConfig, LayerConfig, ModelConfig
from tests.inference.generate_test import chain
from tests.models.variants import VARIANTS
from tests.tiny import random_params, tiny_config

BYTES = ByteTokenizer()
PLAIN = ServeConfig(slots=3, tokens=512, rows=16, tiles=(2, 16))
DECODER = tiny_config(vocab_size=260, max_length=128, num_layers=3)
LATENT = dataclasses.replace(
    VARIANTS["latent"], vocab_size=260, max_length=128, head=HeadConfig(mtp_depth=1)
)
SMALL = tiny_config(vocab_size=260, max_length=128, num_layers=1)
# Some layers have windows; all have.
HYBRID = dataclasses.replace(
    DECODER, pattern=(LayerConfig(window=20), LayerConfig()), head=HeadConfig(mtp_depth=1)
)
LOCAL = dataclasses.replace(DECODER, pattern=(LayerConfig(window=20),))


def guessing(kind: str, **changes: Any) -> ServeConfig:
    return dataclasses.replace(PLAIN, drafts=3, speculate=kind, **changes)


def requests(count: int = 9) -> list[Request]:
    draws = np.random.default_rng(1)
    found = []
    for index in range(count):
        # Every other one has three ids alone, and so repeats itself.
        ids = 3 if index % 2 else 250
        few = ((0, 30.0), (1, 30.0), (2, 30.0))
        prompt = tuple(draws.integers(0, ids, int(draws.integers(1, 40))).tolist())
        sampling = SamplingConfig(
            max_tokens=int(draws.integers(1, 30)),
            temperature=float(draws.choice([0.0, 0.3, 1.0])),
            top_p=float(draws.choice([1.0, 0.9])),
            repetition_penalty=float(draws.choice([1.0, 1.3])),
            frequency_penalty=float(draws.choice([0.0, 0.4])),
            min_tokens=1,
            logit_bias=few if index % 2 else (),
            seed=index,
        )
        found.append(Request(prompt, sampling, logprobs=2))
    return found


def answers(engine: Engine, asked: list[Request]) -> list[tuple]:
    found = [answer.samples[0] for answer in engine.run(asked)]
    assert not any(sample.error for sample in found)
    return [(sample.completion(), sample.logprobs) for sample in found]


def rate(engine: Engine) -> float:
    [replica] = engine.replicas
    return replica.guesses.right / max(replica.guesses.made, 1)


CASES = {
    "look-up": (DECODER, guessing("lookup"), None),
    "first layers": (DECODER, guessing("first_layers", draft_layers=1), None),
    "most layers": (DECODER, guessing("first_layers", draft_layers=2), None),
    "draft": (DECODER, guessing("draft"), SMALL),
    "draft that is preempted": (DECODER, guessing("draft", slots=2, tokens=160), SMALL),
    "multi-token prediction": (LATENT, guessing("mtp"), None),
    "windows, multi-token prediction": (HYBRID, guessing("mtp"), None),
    "windows in all layers, draft": (LOCAL, guessing("draft"), SMALL),
    "windows in all layers, first layers": (LOCAL, guessing("first_layers", draft_layers=1), None),
}


@pytest.mark.fast_cases("look-up", "draft", "multi-token prediction")
@pytest.mark.parametrize(("config", "serve", "small"), CASES.values(), ids=CASES)
def test_answers_with_guesses_are_bit_for_bit_those_without(
    config: ModelConfig, serve: ServeConfig, small: ModelConfig | None
):
    params = random_params(config)
    draft = None if small is None else (small, random_params(small, seed=5))
    plain = answers(Engine(config, params, BYTES, PLAIN), requests())
    engine = Engine(config, params, BYTES, serve, draft=draft)
    assert answers(engine, requests()) == plain
    assert engine.replicas[0].guesses.made > 20


@pytest.mark.thorough
def test_what_guesses_keeps_all_tokens_where_the_model_keeps_a_window():
    params = random_params(LOCAL)
    serve = guessing("draft")
    engine = Engine(LOCAL, params, BYTES, serve, draft=(SMALL, random_params(SMALL, seed=5)))
    [_, windowed] = engine.replicas[0].available_pages
    assert windowed < serve.tokens // PAGE_SIZE
    [layer] = engine.replicas[0]._runner.state.draft_layers
    assert len(layer.tokens.pages.key) == 1 + serve.tokens // PAGE_SIZE
    # The model's own first layers have its pages.
    serve = guessing("first_layers", draft_layers=1)
    assert len(Engine(LOCAL, params, BYTES, serve).replicas[0].available_pages) == 1


def test_a_model_that_guesses_for_itself_is_right_but_for_its_end():
    params = random_params(DECODER)
    engine = Engine(DECODER, params, BYTES, guessing("draft"), draft=(DECODER, params))
    found = answers(engine, requests())
    assert rate(engine) > 0.9
    assert found == answers(Engine(DECODER, params, BYTES, PLAIN), requests())
    # The control: another one is mostly wrong.
    other = Engine(
        DECODER, params, BYTES, guessing("draft"), draft=(DECODER, random_params(DECODER, seed=8))
    )
    answers(other, requests())
    assert rate(other) < 0.5


def test_a_repeated_text_takes_few_steps():
    text = b"abcdefghij" * 2
    config, params = chain(b"abcdefghij")
    follower = params["unembed"].argmax(axis=1)
    follower[ord("j")] = ord("a")
    params["unembed"] = np.eye(config.vocab_size, dtype=np.float32)[follower]
    engine = Engine(config, params, BYTES, dataclasses.replace(guessing("lookup"), tokens=64))
    sampling = SamplingConfig(max_tokens=40, temperature=0.0)
    [(completion, _)] = answers(engine, [Request(tuple(text), sampling)])
    assert completion.text == "abcdefghij" * 4
    [replica] = engine.replicas
    assert replica.guesses.right == replica.guesses.made
    # Two for the prompt of 20 tokens in rows of 16, then four tokens a step.
    assert replica.num_steps <= 2 + 40 // 4 + 1


def test_lookup_takes_the_newest_place_of_the_longest_match():
    lookup = Lookup()
    text = [1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3]
    assert lookup.propose(text, 3) == [4, 9, 2]
    text += [5, 7, 2, 3]
    assert lookup.propose(text, 2) == [5, 7]
    assert lookup.propose([*text, 30, 31], 4) == []
    assert Lookup().propose([7, 8, 7, 8, 7, 8], 5) == [7, 8, 7, 8, 7]
    assert Lookup().propose([1], 3) == []


def test_guesses_that_are_wrong_pause():
    gate = Gate()
    steps = 0
    while gate.allows():
        gate.observe(4, 0)
        steps += 1
    assert 5 < steps < 40
    assert sum(gate.allows() for _ in range(PAUSE)) == 1
    for _ in range(50):
        gate.observe(4, 4)
    assert gate.allows()


@pytest.mark.parametrize(
    ("serve", "config", "draft", "said"),
    [
        (
            guessing("mtp"),
            DECODER,
            None,
            "speculate = 'mtp' needs a model with head.mtp_depth above 0.",
        ),
        (guessing("draft"), DECODER, None, "draft is missing: speculate = 'draft' needs a model."),
        (
            guessing("draft"),
            DECODER,
            tiny_config(vocab_size=99, max_length=128),
            "draft: its vocab_size = 99 must be that of the model, 260: both have one tokenizer.",
        ),
        (
            guessing("first_layers", draft_layers=3),
            DECODER,
            None,
            "draft_layers = 3 must lie in [1, 2]: the model has 3.",
        ),
        (
            guessing("mtp"),
            dataclasses.replace(VARIANTS["prefix"], vocab_size=260, max_length=128),
            None,
            "speculate = 'mtp' needs a decoder, not model.structure = 'prefix'; use 'lookup'.",
        ),
    ],
)
def test_a_kind_that_a_model_lacks_is_refused(serve, config, draft, said):
    with pytest.raises(UserError) as caught:
        Engine(config, random_params(config), BYTES, serve, draft=draft and (draft, {}))
    assert str(caught.value) == said

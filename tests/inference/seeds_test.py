"""A request without a seed is given one, which its answer says, and which gives the same answer."""

import dataclasses
import secrets
from typing import Any

import pytest

from research.data.tokenizers import ByteTokenizer
from research.inference.answers import DRAWN_SEEDS, Answer
from research.inference.beam_config import BeamConfig
from research.inference.engine import Engine
from research.inference.generate import generate
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from tests.tiny import random_params, tiny_config

BYTES = ByteTokenizer()
CONFIG = tiny_config(vocab_size=260, max_length=96)
SERVE = ServeConfig(slots=4, tokens=512, rows=16, tiles=(8,), top_logprobs=8)
# No end id, so that all texts have their whole length.
DRAWN = SamplingConfig(max_tokens=30, min_tokens=30, temperature=1.0)
GREEDY = dataclasses.replace(DRAWN, temperature=0.0)
PROMPT = (5, 6, 7)
BEAMS = BeamConfig(num_beams=2, max_tokens=6)


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def engine(params: Any) -> Engine:
    return Engine(CONFIG, params, BYTES, SERVE)


def with_seed(request: Request, seed: int) -> Request:
    return dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, seed=seed))


def found(answer: Answer) -> list[tuple[Any, ...]]:
    """Tokens, log-probabilities and seed of each sample."""
    assert not any(sample.error for sample in answer.samples)
    return [(each.seed, each.completion(), each.logprobs) for each in answer.samples]


def refuse(_: int) -> int:
    raise AssertionError("a seed was drawn")


@pytest.mark.parametrize("fields", [{}, {"count": 3}, {"count": 2, "best_of": 4}], ids=repr)
def test_the_seed_that_an_answer_says_gives_the_answer_again(params, engine, fields):
    request = Request(PROMPT, DRAWN, logprobs=2, **fields)
    [first], [second] = engine.run([request]), engine.run([request])
    assert first.seed != second.seed
    assert first.samples[0].completion() != second.samples[0].completion()
    seeds = [sample.seed for sample in first.samples]
    assert seeds == [first.seed + index for index in range(request.num_samples)]

    # In an engine that has answered nothing else.
    fresh = Engine(CONFIG, params, BYTES, SERVE)
    [again] = fresh.run([with_seed(request, first.seed)])
    assert found(again) == found(first)
    assert [each.seed for each in again.best()] == [each.seed for each in first.best()]
    one = Request(PROMPT, DRAWN, logprobs=2)
    alone = fresh.run([with_seed(one, seed) for seed in seeds])
    assert [found(each)[0] for each in alone] == found(first)


@pytest.mark.parametrize(
    "changes",
    [{"tokens": 96}, {"drafts": 3, "speculate": "lookup"}],
    ids=["preempted", "with guesses"],
)
def test_one_seed_holds_to_the_end_of_an_answer(params, engine, changes: dict[str, Any]):
    other = Engine(CONFIG, params, BYTES, dataclasses.replace(SERVE, **changes))
    prompts = [(3, 4, 3, 4, index) for index in range(6)]
    requests = [Request(prompt, DRAWN, count=2) for prompt in prompts]
    answers = other.run(requests)
    assert len({answer.seed for answer in answers}) == len(answers)
    # Tokens were read again, or guessed in vain.
    once = sum(len(prompt) + DRAWN.max_tokens - 1 for prompt in prompts)
    assert other.replicas[0].num_rows > 2 * once
    for request, answer in zip(requests, answers, strict=True):
        [whole] = engine.run([with_seed(request, answer.seed)])
        assert found(whole) == found(answer)


def test_one_seed_holds_after_other_parameters_and_in_a_stream(params, engine):
    stream = engine.stream(Request(PROMPT, DRAWN))
    answer = next(stream)
    seed = answer.seed
    text = answer.samples[0].take_text()
    # All tokens so far are read again.
    engine.update_params(params)
    for answer in stream:
        assert answer.seed == seed
        text += answer.samples[0].take_text()
    [whole] = engine.run([with_seed(answer.request, seed)])
    assert found(whole) == found(answer)
    assert text == whole.samples[0].completion().text


def test_seeds_that_are_drawn_end_where_every_reader_of_json_has_them(monkeypatch):
    asked = []

    def largest(count: int) -> int:
        asked.append(count)
        return count - 1

    monkeypatch.setattr(secrets, "randbelow", largest)
    for count in (1, 3):
        answer = Answer(Request(PROMPT, DRAWN, count=count))
        assert answer.seed + count - 1 == DRAWN_SEEDS - 1
    assert asked == [DRAWN_SEEDS, DRAWN_SEEDS - 2]
    best = Answer(Request(PROMPT, DRAWN, count=2, best_of=5))
    assert best.seed + 4 == DRAWN_SEEDS - 1
    assert float(DRAWN_SEEDS - 1) == DRAWN_SEEDS - 1


@pytest.mark.parametrize(
    "request_",
    [
        Request(PROMPT, GREEDY, count=2, logprobs=2),
        Request(PROMPT, DRAWN, beams=BEAMS),
        Request(PROMPT, dataclasses.replace(DRAWN, seed=5)),
    ],
    ids=["greedy", "beams", "a seed of its own"],
)
def test_no_seed_is_drawn_where_none_is_needed(engine, request_, monkeypatch):
    monkeypatch.setattr(secrets, "randbelow", refuse)
    [answer] = engine.run([request_])
    seed = request_.sampling.seed or 0
    assert answer.seed == seed
    [explicit] = engine.run([with_seed(request_, seed)])
    assert (found(explicit), explicit.beams) == (found(answer), answer.beams)
    # The control: others are given one.
    with pytest.raises(AssertionError, match="a seed was drawn"):
        engine.submit(Request(PROMPT, DRAWN))


def test_what_is_made_at_once_has_the_seed_0_where_none_is_said(params, monkeypatch):
    monkeypatch.setattr(secrets, "randbelow", refuse)
    model = (CONFIG, params, BYTES, ["ab", "ab"])
    first = dataclasses.replace(DRAWN, seed=0)
    found = generate(*model, DRAWN)
    assert found == generate(*model, first)
    assert found[0] != found[1]
    # Settings for each prompt, of which one says its seed.
    seventh = dataclasses.replace(DRAWN, seed=7)
    assert generate(*model, [DRAWN, seventh]) == generate(*model, DRAWN, [0, 7])

"""An answer of the engine is a function of the request alone."""

import dataclasses

import numpy as np
import pytest

from research.data.tokenizers import ByteTokenizer
from research.inference.engine import Engine, ServeConfig
from research.inference.generate import generate
from research.inference.sampling import SamplingConfig
from tests.tiny import random_params, tiny_config

CONFIG = tiny_config(vocab_size=260, max_length=96)
SERVE = ServeConfig(slots=4, tokens=256, rows=16, tiles=(2, 8))


def requests(count: int, seed: int = 0) -> list[tuple[list[int], SamplingConfig]]:
    draws = np.random.default_rng(seed)
    found = []
    for index in range(count):
        length = int(draws.integers(1, 50))
        ids = draws.integers(0, 256, length).tolist()
        sampling = SamplingConfig(
            max_tokens=int(draws.integers(1, 20)),
            temperature=float(draws.choice([0.0, 0.7, 1.3])),
            top_k=int(draws.choice([0, 5])),
            top_p=float(draws.choice([1.0, 0.9])),
            repetition_penalty=float(draws.choice([1.0, 1.2])),
            seed=index,
        )
        found.append((ids, sampling))
    return found


def answers(params, asked, serve=SERVE) -> list[tuple[tuple[int, ...], list[float]]]:
    engine = Engine(CONFIG, params, ByteTokenizer(), serve)
    found = [engine.submit(ids, sampling) for ids, sampling in asked]
    while engine.run_step():
        pass
    return [(answer.completion().tokens, answer.logprobs) for answer in found]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def alone(params):
    return [answers(params, [request])[0] for request in requests(12)]


def test_answers_are_those_of_a_batch(params, alone):
    asked = requests(12)
    prompts = [ids for ids, _ in asked]
    expected = generate(CONFIG, params, ByteTokenizer(), prompts, [how for _, how in asked])
    assert [tokens for tokens, _ in alone] == [each.tokens for each in expected]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rows": 4},
        {"rows": 40, "slots": 9, "tokens": 2048},
        {"tokens": 80},
        {"tiles": (8,)},
        {"tiles": (2,)},
    ],
    ids=["mixed", "small chunks", "large chunks", "preempted", "large tiles", "small tiles"],
)
def test_an_answer_is_bit_for_bit_that_of_the_request_alone(params, alone, changes):
    found = answers(params, requests(12), dataclasses.replace(SERVE, **changes))
    assert found == alone

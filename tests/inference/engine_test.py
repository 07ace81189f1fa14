"""An answer of the engine is a function of the request alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.data.tokenizers import ByteTokenizer
from research.inference.engine import Engine
from research.inference.generate import generate
from research.inference.logits import logits
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.models.config import ModelConfig
from tests.models.variants import VARIANTS as ALL_VARIANTS
from tests.tiny import random_params, tiny_config

CONFIG = tiny_config(vocab_size=260, max_length=96)
VARIANTS = {
    name: dataclasses.replace(config, vocab_size=260, max_length=96)
    for name, config in ALL_VARIANTS.items()
    if config.structure != "encoder"
}
SERVE = ServeConfig(slots=4, tokens=256, rows=16, tiles=(2, 8))
# Few pages, so that sequences are preempted, and one program.
SMALL = ServeConfig(slots=4, tokens=96, rows=16, tiles=(8,))


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


Found = list[tuple[tuple[int, ...], list[float]]]


def answers(params, asked, serve=SERVE, config=CONFIG, *, alone: bool = False) -> Found:
    """Answers all requests at once, or one after the other."""
    engine = Engine(config, params, ByteTokenizer(), serve)
    batch = [Request(tuple(ids), sampling) for ids, sampling in asked]
    found = []
    for part in [[request] for request in batch] if alone else [batch]:
        found += engine.run(part)
    samples = [answer.samples[0] for answer in found]
    return [
        (sample.completion().tokens, [each.logprob for each in sample.logprobs])
        for sample in samples
    ]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def alone(params):
    return answers(params, requests(12), alone=True)


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
        {"rows": 40, "drafts": 5, "speculate": "lookup"},
        {"rows": 40, "drafts": 3, "speculate": "lookup", "slots": 2, "tokens": 80},
    ],
    ids=[
        "mixed",
        "small chunks",
        "large chunks",
        "preempted",
        "large tiles",
        "small tiles",
        "look-up",
        "look-up in pairs",
    ],
)
def test_an_answer_is_bit_for_bit_that_of_the_request_alone(params, alone, changes):
    found = answers(params, requests(12), dataclasses.replace(SERVE, **changes))
    assert found == alone


def whole_logprobs(config: ModelConfig, params, ids: list[int], tokens: list[int]) -> np.ndarray:
    """Log-probabilities of an answer, of one run of the model over prompt and answer."""
    inputs = {}
    start = list(ids)
    if config.structure == "encoder_decoder":
        start = [config.decoder_start_id]
        inputs["encoder_tokens"] = jnp.array([ids])
    whole = jnp.array([[*start, *tokens]])
    inputs |= {"tokens": whole, "positions": jnp.arange(whole.shape[1])[None]}
    if config.structure == "prefix":
        inputs["prefix"] = (inputs["positions"] < len(ids)).astype(jnp.int32)
    found = logits(config, params, inputs)
    logprobs = jax.nn.log_softmax(found, axis=-1)[0]
    before = np.arange(len(start), whole.shape[1])
    return np.asarray(logprobs)[before - 1, tokens]


@pytest.mark.fast_cases("int8-latent")
@pytest.mark.parametrize(
    ("cache_dtype", "name"),
    [
        ("bfloat16", "latent"),
        ("int8", "latent"),
        ("int8", "windows"),
        ("float8_e4m3fn", "encoder-decoder"),
    ],
)
def test_answers_from_narrow_pages_are_bit_for_bit_those_of_the_request_alone(
    cache_dtype: str, name: str
):
    config = VARIANTS[name]
    params = random_params(config)
    serve = dataclasses.replace(SMALL, cache_dtype=cache_dtype)
    asked = requests(6, seed=5)
    alone = answers(params, asked, serve, config, alone=True)
    assert answers(params, asked, serve, config) == alone
    # The control: pages of the model's own type give other log-probabilities.
    assert answers(params, asked, SMALL, config) != alone


@pytest.mark.fast_cases("windows", "buckets", "latent", "dynamic")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_model_answers_as_it_reads_whole_texts(name: str):
    config = VARIANTS[name]
    params = random_params(config)
    asked = []
    # Whole texts of few lengths, each of which is compiled.
    for length, (ids, how) in zip((2, 2, 17, 41, 41), requests(5, seed=3), strict=True):
        ids = np.resize(ids, length).tolist()
        # As long as their limit: the rules of RoPE that go by length then read the same length.
        asked.append((ids, dataclasses.replace(how, max_tokens=9)))
    found = answers(params, asked, SMALL, config)
    assert found == answers(params, asked, SMALL, config, alone=True)
    for (ids, _), (tokens, logprobs) in zip(asked, found, strict=True):
        if len(tokens) == 9:
            expected = whole_logprobs(config, params, ids, list(tokens))
            # Logits of these models, whose parameters have a deviation of 0.3, are around 10: ten
            # times those of trained ones.
            np.testing.assert_allclose(logprobs, expected, atol=4e-5)

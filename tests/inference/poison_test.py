"""What a request with values that are no numbers leaves in pages and memory reaches no other."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from research.data.tokenizers import ByteTokenizer
from research.inference.engine import Engine
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.models.config import LayerConfig
from tests.models.variants import VARIANTS
from tests.tiny import random_params

SERVE = ServeConfig(slots=2, tokens=128, rows=8, tiles=(8,))
# The token whose embedding is NaN; nobody draws it.
LOUD = 77
DRAWN = SamplingConfig(max_tokens=6, seed=3, logit_bias=((LOUD, -1e9),))
LOCAL = dataclasses.replace(VARIANTS["relative"], pattern=(LayerConfig(window=4),))
CASES = {**VARIANTS, "windows, relative": LOCAL}
SHARED = tuple(range(5, 34))
BAD = Request((LOUD, *SHARED, LOUD), DRAWN)
# The first has the prompt of the bad one behind its first token; others have pages in common.
GOOD = [
    Request(ids, DRAWN) for ids in (SHARED, (5, 9, 6, 8), tuple(range(1, 20)), (*SHARED, 3), (1, 2))
]


def engine_of(name: str, loud: int = LOUD) -> Engine:
    config = dataclasses.replace(
        CASES[name],
        vocab_size=260,
        max_length=64,
        num_layers=2,
        tied_embeddings=False,
        decoder_start_id=3 * (CASES[name].structure == "encoder_decoder"),
    )
    params = dict(random_params(config))
    table = np.array(params["embed"]["embedding"])
    table[loud] = np.nan
    params["embed"] = {**params["embed"], "embedding": jnp.asarray(table)}
    return Engine(config, params, ByteTokenizer(), SERVE)


def answers(engine: Engine, requests: list[Request]) -> list[list[tuple[int, float]]]:
    found = []
    for answer in engine.run(requests):
        [sample] = answer.samples
        assert sample.error is None
        found.append([(each.token, each.logprob) for each in sample.logprobs])
    return found


@pytest.mark.fast_cases("latent", "relative", "encoder-decoder")
@pytest.mark.parametrize(
    "name",
    [
        "latent",
        "relative",
        "windows, relative",
        "buckets",
        "rounded alibi",
        "prefix",
        "encoder-decoder",
        "post-norm encoder-decoder",
        "windows",
        "experts",
    ],
)
def test_what_a_bad_request_leaves_reaches_no_other(name: str):
    expected = answers(engine_of(name), GOOD)
    engine = engine_of(name)
    # Before, in the same steps, and after.
    for _ in range(2):
        bad, *_ = engine.run([BAD, GOOD[1]])
        assert bad.samples[0].error == "its logits are not numbers"
        assert answers(engine, GOOD) == expected
    bad = engine.submit(BAD)
    beside = engine.submit_all(GOOD)
    while engine.run_step():
        pass
    assert bad.samples[0].error == "its logits are not numbers"
    found = [[(each.token, each.logprob) for each in one.samples[0].logprobs] for one in beside]
    assert found == expected


@pytest.mark.fast_cases("prefix")
@pytest.mark.parametrize(
    "name", ["prefix", "encoder-decoder", "relative", "experts", "windows, relative"]
)
def test_padding_reaches_no_request(name: str):
    """Token 0 pads rows and prompts."""
    # As many tokens that pages lie before the window.
    quiet = dataclasses.replace(DRAWN, max_tokens=25, logit_bias=((0, -1e9), (LOUD, -1e9)))
    asked = [dataclasses.replace(each, sampling=quiet) for each in GOOD]
    assert answers(engine_of(name, loud=0), asked) == answers(engine_of(name), asked)


def test_a_text_that_ends_within_a_character_is_the_same_streamed():
    # The prompt ends with the first byte of "é".
    engine = engine_of("windows")
    answer = engine.submit(Request((LOUD, "é".encode()[0]), DRAWN))
    text = ""
    while not answer.finished:
        engine.run_step()
        text += answer.samples[0].take_text()
    assert answer.samples[0].error == "its logits are not numbers"
    assert text == answer.samples[0].completion().text == "\ufffd"

"""Requests drawn at random, of all that one may ask: the bench and the tests of exactness share
them.
"""

import dataclasses
import importlib.util
from typing import Any

import numpy as np

from research.core.random import SEEDS
from research.inference.beam_config import BeamConfig
from research.inference.grammar_config import GrammarConfig
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.slots import LogprobKind
from research.models.config import ModelConfig

# Ids that prompts have: bytes.
NUM_PROMPT_IDS = 256
# Texts that prompts begin with.
NUM_STEMS = 4
# Shares of the requests that search, and that keep to a grammar.
BEAMS = 0.08
GUIDED = 0.15
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS = (
    {"json_schema": SCHEMA},
    {"regex": r"[ab]{3,9}-\d{2}"},
    {"choices": ("yes, of course", "no", "né")},
    {"lark": 'start: "(" start? ")"'},
)


def draw_requests(config: ModelConfig, count: int, seed: int = 0) -> list[Request]:
    """Returns requests; those with a grammar need llguidance, and without it there are none.

    Args:
      config: of the model, whose `max_length` prompts and answers may reach.
      count: of requests.
      seed: of the draws: request i is the same whatever the count.
    """
    return [_draw(config, np.random.default_rng([seed, index]), seed) for index in range(count)]


def _draw(config: ModelConfig, random: np.random.Generator, seed: int) -> Request:
    ids = _prompt(config, random, seed)
    start = 1 if config.structure == "encoder_decoder" else len(ids)
    most = config.max_length - start
    # One in ten reaches the limit.
    max_tokens = most if random.random() < 0.1 else _log_uniform(random, most)
    if random.random() < BEAMS:
        return Request(ids, beams=_beams(random, max_tokens))
    fields = {"sampling": _sampling(random, max_tokens), **_extras(random)}
    if config.structure == "decoder" and random.random() < 0.2:
        fields["prompt_logprobs"] = int(random.integers(0, 4))
    has_grammars = importlib.util.find_spec("llguidance") is not None
    if random.random() < GUIDED and has_grammars:
        grammar = GRAMMARS[int(random.integers(len(GRAMMARS)))]
        fields["grammar"] = GrammarConfig(**grammar)
    return Request(ids, **fields)


def _prompt(config: ModelConfig, random: np.random.Generator, seed: int) -> tuple[int, ...]:
    """Returns a prompt: random, or the start of a stem with more behind it, or a text that repeats
    itself.
    """
    length = _log_uniform(random, config.max_length - 1)
    ids = random.integers(0, NUM_PROMPT_IDS, length)
    kind = random.choice(["random", "stem", "stem", "repeats"])
    if kind == "stem":
        stem = np.random.default_rng([seed, 2**32 + int(random.integers(NUM_STEMS))])
        shared = int(random.integers(0, length + 1))
        ids[:shared] = stem.integers(0, NUM_PROMPT_IDS, config.max_length)[:shared]
    if kind == "repeats":
        # [7, 8, 9] of 8 tokens -> 7 8 9 7 8 9 7 8
        period = int(random.integers(1, 8))
        ids = np.resize(ids[:period], length)
    return tuple(ids.tolist())


def _log_uniform(random: np.random.Generator, most: int) -> int:
    """Returns a number from 1 to `most`: as many below its root as above it."""
    return min(most, int(np.exp(random.uniform(0, np.log(most + 1)))))


def _sampling(random: np.random.Generator, max_tokens: int) -> SamplingConfig:
    def one_of(*values: Any) -> Any:
        return values[int(random.integers(len(values)))]

    bias = [(int(i), float(random.normal(0, 3))) for i in random.integers(0, NUM_PROMPT_IDS, 3)]
    letters = [chr(i) for i in random.integers(32, 127, 3)]
    return SamplingConfig(
        max_tokens=max_tokens,
        min_tokens=one_of(0, 0, 0, max_tokens // 2),
        temperature=one_of(0.0, 0.0, 0.3, 0.8, 1.4),
        top_k=one_of(0, 0, 5, 40),
        top_p=one_of(1.0, 1.0, 0.9, 0.5),
        min_p=one_of(0.0, 0.0, 0.0, 0.05),
        typical_p=one_of(1.0, 1.0, 1.0, 0.8),
        repetition_penalty=one_of(1.0, 1.0, 1.3),
        presence_penalty=one_of(0.0, 0.0, 0.5),
        frequency_penalty=one_of(0.0, 0.0, 0.3),
        logit_bias=one_of((), (), tuple(bias)),
        seed=int(random.integers(SEEDS, dtype=np.uint64)),
        # A letter, or two of which the first alone is held back.
        stop=one_of((), (), (letters[0],), (letters[1] + letters[2], letters[0])),
        stop_ids=one_of((), (), tuple({each for each, _ in bias})),
    )


def _extras(random: np.random.Generator) -> dict[str, Any]:
    """Returns how many answers there are, and what is told of them."""
    count = int(random.choice([1, 1, 1, 2, 3]))
    more = int(random.integers(0, 3)) if random.random() < 0.2 else 0
    return {
        "count": count,
        "best_of": count + more if more else 0,
        "logprobs": int(random.choice([0, 0, 3, 8])),
        "logprob_kind": LogprobKind.PROCESSED if random.random() < 0.2 else LogprobKind.RAW,
        "kept": bool(random.random() < 0.2),
    }


def _beams(random: np.random.Generator, max_tokens: int) -> BeamConfig:
    return BeamConfig(
        num_beams=int(random.integers(2, 5)),
        # A search takes all its beams' steps.
        max_tokens=min(max_tokens, 24),
        length_penalty=float(random.choice([0.0, 1.0])),
        no_repeat_ngram=int(random.choice([0, 2])),
        num_return=2,
    )


def other_seed(request: Request) -> Request:
    """Returns a request that is answered otherwise, where it draws at all."""
    # A search has none.
    sampling = request.sampling.with_seed()
    sampling = dataclasses.replace(sampling, seed=(sampling.seed + 1) % SEEDS)
    return dataclasses.replace(request, sampling=sampling)

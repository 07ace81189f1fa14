"""Answers that keep to a grammar, alone and beside others, with guesses and without."""

import dataclasses
import json
import re

import pytest

from research.core.errors import UserError
from research.data.tokenizers import ByteTokenizer
from research.inference.engine import Engine
from research.inference.grammar import GrammarCompiler
from research.inference.grammar_config import GrammarConfig, GrammarLimits
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from tests.tiny import random_params, tiny_config

BYTES = ByteTokenizer()
CONFIG = tiny_config(vocab_size=260, max_length=256)
PLAIN = ServeConfig(slots=4, tokens=512, rows=32, tiles=(2, 8))
GUESSING = dataclasses.replace(PLAIN, drafts=6, speculate="lookup")
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["ada", "bob"]}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
GRAMMARS = {
    "schema": GrammarConfig(json_schema=SCHEMA),
    "regex": GrammarConfig(regex=r"[ab]{3,9}-\d{2}"),
    "choices": GrammarConfig(choices=("yes, of course", "no", "né")),
    "lark": GrammarConfig(lark='start: "(" start? ")"'),
}


def drawn(grammar: GrammarConfig | None, seed: int) -> Request:
    sampling = SamplingConfig(max_tokens=60, temperature=0.8, seed=seed)
    return Request((5, 6, 7 + seed), sampling, grammar=grammar)


REQUESTS = [drawn(grammar, seed) for seed in range(4) for grammar in (*GRAMMARS.values(), None)]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def answers(engine: Engine, requests: list[Request]) -> list[tuple[str, tuple, list[float]]]:
    found = []
    for answer in engine.run(requests):
        [sample] = answer.samples
        assert sample.error is None
        completion = sample.completion()
        logprobs = [each.logprob for each in sample.logprobs]
        found.append((completion.text, completion.tokens, logprobs))
    return found


@pytest.fixture(scope="module")
def alone(params):
    engine = Engine(CONFIG, params, BYTES, PLAIN)
    return [answers(engine, [request])[0] for request in REQUESTS]


def fits(text: str, grammar: GrammarConfig) -> bool:
    if grammar is GRAMMARS["schema"]:
        found = json.loads(text)
        is_age = isinstance(found["age"], int) and found["age"] >= 0
        return set(found) == {"name", "age"} and found["name"] in ("ada", "bob") and is_age
    if grammar is GRAMMARS["regex"]:
        return re.fullmatch(r"[ab]{3,9}-\d{2}", text) is not None
    if grammar is GRAMMARS["choices"]:
        return text in grammar.choices
    depth = len(text) // 2
    return depth > 0 and text == "(" * depth + ")" * depth


def test_answers_keep_to_their_grammars(alone):
    ended = 0
    for request, (text, tokens, _) in zip(REQUESTS, alone, strict=True):
        if request.grammar is None or tokens[-1] != BYTES.eos_id:
            continue
        ended += 1
        assert fits(text, request.grammar), text
    assert ended > 8
    free = [
        text for request, (text, _, _) in zip(REQUESTS, alone, strict=True) if not request.grammar
    ]
    assert not any(fits(text, GRAMMARS["choices"]) for text in free)  # the control


@pytest.mark.parametrize("serve", [PLAIN, GUESSING], ids=["plain", "guessing"])
def test_answers_under_a_grammar_are_bit_for_bit_those_of_the_request_alone(params, alone, serve):
    engine = Engine(CONFIG, params, BYTES, serve)
    assert answers(engine, REQUESTS) == alone
    [replica] = engine.replicas
    # What a grammar forces is guessed, and never wrong.
    assert (replica.guesses.right > 0) == (serve is GUESSING)


def test_forced_text_takes_few_steps(params):
    engine = Engine(CONFIG, params, BYTES, GUESSING)
    grammar = GrammarConfig(choices=("a very long text that has no other",))
    [answer] = engine.run([Request((5, 6), SamplingConfig(max_tokens=60, seed=0), grammar=grammar)])
    completion = answer.samples[0].completion()
    assert completion.text == "a very long text that has no other"
    [replica] = engine.replicas
    assert replica.num_steps < len(completion.tokens) // 3
    assert replica.guesses.right == replica.guesses.made


def test_a_grammar_that_cannot_be_met_ends_its_request_alone(params):
    engine = Engine(CONFIG, params, BYTES, PLAIN)
    lark = GrammarConfig(lark='start: /a(?=b)/ "c"')
    with pytest.raises(UserError):
        engine.run([REQUESTS[0], Request((5,), grammar=lark)])
    assert not engine.run_step()
    assert answers(engine, [REQUESTS[0]])


def test_a_grammar_that_ends_before_min_tokens_says_so(params):
    engine = Engine(CONFIG, params, BYTES, PLAIN)
    sampling = SamplingConfig(max_tokens=20, min_tokens=10, seed=0)
    grammars = (GrammarConfig(choices=("ab",)), GrammarConfig(regex="[ab]{12}"))
    requests = [Request((5, 6), sampling, grammar=grammar) for grammar in grammars]
    [short], [long] = [answer.samples for answer in engine.run(requests)]
    assert short.error == "min_tokens = 10: after 2 tokens the grammar allows the end alone"
    assert long.error is None


def until_limits(params, serve: ServeConfig) -> list[tuple[str | None, tuple, list[float]]]:
    """Answers of two requests whose grammar comes to its limits, and of one without a grammar."""
    engine = Engine(CONFIG, params, BYTES, serve)
    [replica] = engine.replicas
    limits = GrammarLimits(lexer_states=150)
    replica._grammars = GrammarCompiler(BYTES, num_ids=replica._num_ids, limits=limits)
    # Its automaton has 2^13 states, and each random text needs some of them.
    large = GrammarConfig(regex="(a|b)*a(a|b){12}")
    free = SamplingConfig(max_tokens=200, min_tokens=200, seed=9)
    letters = dataclasses.replace(free, logit_bias=((ord("a"), 30.0), (ord("b"), 30.0)))
    requests = [
        Request((5, 6), dataclasses.replace(letters, seed=seed), grammar=large) for seed in (1, 2)
    ]
    found = []
    for answer in engine.run([*requests, Request((7, 8), free)]):
        [sample] = answer.samples
        logprobs = [each.logprob for each in sample.logprobs]
        found.append((sample.error, sample.completion().tokens, logprobs))
    return found


def test_limits_reached_among_guesses_end_their_request_alone_and_where_they_do_without(params):
    serve = dataclasses.replace(PLAIN, tokens=1024)
    guessing = dataclasses.replace(serve, rows=32, tiles=(32,), drafts=6, speculate="lookup")
    found = until_limits(params, guessing)
    assert found == until_limits(params, serve)
    *limited, (error, tokens, _) = found
    assert error is None
    assert len(tokens) == 200
    for error, tokens, _ in limited:
        assert error is not None
        assert "cannot be met: lexer error: too many states: 150" in error
        assert 50 < len(tokens) < 200

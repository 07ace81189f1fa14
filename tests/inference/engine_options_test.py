"""What a request may ask of the engine, and that nothing is left of it when it has ended."""

import dataclasses
import logging
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.data.tokenizers import ByteTokenizer
from research.inference.answers import Sample
from research.inference.beam_config import BeamConfig
from research.inference.engine import Engine
from research.inference.grammar_config import GrammarConfig
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.inference.slots import LogprobKind
from research.inference.text import Completion
from research.kernels.decode_attention import PAGE_SIZE
from tests.inference.generate_test import chain
from tests.tiny import logits, random_params, tiny_config

BYTES = ByteTokenizer()
CONFIG = tiny_config(vocab_size=260, max_length=512)
SERVE = ServeConfig(slots=4, tokens=1024, rows=16, tiles=(2, 8), top_logprobs=8)
PROMPT = tuple(range(5, 25))
DRAWN = SamplingConfig(max_tokens=10, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def engine(params) -> Engine:
    return Engine(CONFIG, params, BYTES, SERVE)


def free_pages(engine: Engine) -> tuple[int, ...]:
    [replica] = engine.replicas
    assert not replica.under_way
    return replica.available_pages


def settle(engine: Engine) -> None:
    while engine.run_step():
        pass
    engine.run_step()


def one(engine: Engine, request: Request) -> Sample:
    [answer] = engine.run([request])
    return answer.samples[0]


def tokens(sample: Sample) -> tuple[int, ...]:
    return sample.completion().tokens


def whole_logprobs(params, ids: tuple[int, ...]) -> np.ndarray:
    found = logits(CONFIG, params, np.array([ids], np.int32))[0]
    return np.asarray(jax.nn.log_softmax(found, axis=-1))


def test_samples_of_a_request_are_those_of_the_seeds_in_turn(engine):
    [answer] = engine.run([Request(PROMPT, DRAWN, count=3)])
    alone = [
        one(engine, Request(PROMPT, dataclasses.replace(DRAWN, seed=seed))) for seed in (3, 4, 5)
    ]
    assert [tokens(each) for each in answer.samples] == [tokens(each) for each in alone]
    assert len({tokens(each) for each in answer.samples}) == 3


def test_the_best_of_several_is_the_likeliest_by_token(engine):
    [answer] = engine.run([Request(PROMPT, DRAWN, count=2, best_of=4)])
    assert len(answer.samples) == 4
    ordered = sorted(answer.samples, key=lambda each: -each.mean_logprob())
    assert answer.best() == ordered[:2]
    assert ordered[0].mean_logprob() > ordered[3].mean_logprob()


def test_the_best_of_several_is_that_of_the_highest_reward(engine):
    def reward(completion: Completion) -> float:
        return -completion.tokens[0]

    [answer] = engine.run([Request(PROMPT, DRAWN, count=2, best_of=4, reward=reward)])
    firsts = [tokens(each)[0] for each in answer.samples]
    assert len(set(firsts)) > 2
    assert [tokens(each)[0] for each in answer.best()] == sorted(firsts)[:2]
    by_likelihood = sorted(answer.samples, key=Sample.mean_logprob, reverse=True)
    assert by_likelihood[:2] != answer.best()  # the control
    [odd] = engine.run([Request(PROMPT, DRAWN, best_of=2, reward=lambda _: float("nan"))])
    with pytest.raises(UserError, match="reward = nan of an answer must be a number"):
        odd.best()


def test_logprobs_are_those_of_the_model(engine, params):
    request = Request(PROMPT, DRAWN, logprobs=5, prompt_logprobs=3)
    [answer] = engine.run([request])
    found = answer.samples[0]
    ids = (*PROMPT, *tokens(found))
    expected = whole_logprobs(params, ids)
    for place, each in enumerate(found.logprobs, len(PROMPT)):
        row = expected[place - 1]
        assert each.token == ids[place]
        assert each.logprob == pytest.approx(row[each.token], abs=1e-5)
        assert [i for i, _ in each.top] == np.argsort(-row, kind="stable")[:5].tolist()
        np.testing.assert_allclose([x for _, x in each.top], np.sort(row)[::-1][:5], atol=1e-5)
    assert sorted(answer.prompt_logprobs) == list(range(1, len(PROMPT)))
    for place, each in answer.prompt_logprobs.items():
        assert each.logprob == pytest.approx(expected[place - 1, PROMPT[place]], abs=1e-5)
        assert len(each.top) == 3


def test_processed_logprobs_are_of_what_is_drawn_from(engine, params):
    sampling = dataclasses.replace(DRAWN, temperature=0.7, top_k=4)
    request = Request(PROMPT, sampling, logprobs=4, kept=True, logprob_kind=LogprobKind.PROCESSED)
    found = one(engine, request)
    expected = whole_logprobs(params, (*PROMPT, *tokens(found)))
    for place, each in enumerate(found.logprobs, len(PROMPT)):
        row = expected[place - 1, : BYTES.vocab_size] / 0.7
        best = np.argsort(-row)[:4]
        assert each.logprob == pytest.approx(
            float(row[each.token] - jax.nn.logsumexp(row[best])), abs=1e-4
        )
        bits = np.unpackbits(each.kept.view(np.uint8), bitorder="little")
        assert set(np.flatnonzero(bits).tolist()) == set(best.tolist())


def test_prompt_logprobs_are_computed_again_where_the_prompt_is_cached(engine):
    prompt = (*range(200), 7)
    first = one(engine, Request(prompt, DRAWN))
    [again] = engine.run([Request(prompt, DRAWN, prompt_logprobs=0)])
    assert sorted(again.prompt_logprobs) == list(range(1, len(prompt)))
    assert tokens(again.samples[0]) == tokens(first)


def test_a_text_has_no_end_before_min_tokens():
    config, params = chain(b"abc")
    engine = Engine(config, params, BYTES, dataclasses.replace(SERVE, tokens=256))
    greedy = SamplingConfig(max_tokens=6, temperature=0.0)
    assert tokens(one(engine, Request((ord("a"),), greedy)))[-1] == BYTES.eos_id
    later = one(engine, Request((ord("a"),), dataclasses.replace(greedy, min_tokens=5)))
    assert len(tokens(later)) >= 5
    assert BYTES.eos_id not in tokens(later)[:4]


def test_stop_ids_end_a_text_and_are_no_text():
    config, params = chain(b"abcdef")
    engine = Engine(config, params, BYTES, dataclasses.replace(SERVE, tokens=256))
    stopped = SamplingConfig(max_tokens=6, temperature=0.0, stop_ids=(ord("d"),))
    found = one(engine, Request((ord("a"),), stopped)).completion()
    assert (found.text, found.finish, found.stop_match) == ("bc", "stop", ord("d"))


def test_bias_decides(engine):
    sampling = dataclasses.replace(DRAWN, logit_bias=((9, 1e4),))
    assert set(tokens(one(engine, Request(PROMPT, sampling)))) == {9}


def test_streamed_text_is_the_whole_text(engine):
    request = Request(PROMPT, dataclasses.replace(DRAWN, max_tokens=30, stop=("\x13",)))
    parts = [answer.samples[0].take_text() for answer in engine.stream(request)]
    assert "".join(parts) == one(engine, request).completion().text
    assert sum(bool(part) for part in parts) > 3


@pytest.mark.parametrize("after", [0, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("kind", ["sampled", "several", "searched"])
def test_an_aborted_request_leaves_no_page(engine, after: int, kind: str):
    settle(engine)
    before = free_pages(engine)
    prompt = tuple(np.random.default_rng(after).integers(0, 200, 150).tolist())
    asked = {
        "sampled": Request(prompt, dataclasses.replace(DRAWN, max_tokens=100)),
        "several": Request(prompt, dataclasses.replace(DRAWN, max_tokens=100), count=6),
        "searched": Request(prompt, beams=BeamConfig(num_beams=3, max_tokens=100)),
    }[kind]
    other = engine.submit(Request(PROMPT, DRAWN))
    answer = engine.submit(asked)
    for _ in range(after):
        engine.run_step()
    engine.abort(answer)
    assert answer.finished
    settle(engine)
    assert free_pages(engine) == before
    assert tokens(other.samples[0]) == tokens(one(engine, Request(PROMPT, DRAWN)))


@pytest.mark.thorough
def test_a_thousand_aborts_leave_no_page(engine):
    settle(engine)
    before = free_pages(engine)
    draws = np.random.default_rng(8)
    under_way = []
    aborted = 0
    while aborted < 1000:
        # Fewer prompts than requests, so that pages are shared.
        prompt = tuple(np.random.default_rng(int(draws.integers(5))).integers(0, 200, 70).tolist())
        kind = int(draws.integers(3))
        sampling = dataclasses.replace(DRAWN, max_tokens=40, seed=aborted)
        request = Request(prompt[: 20 + kind * 25], sampling, count=1 + kind)
        if kind == 0:
            request = Request(prompt, beams=BeamConfig(num_beams=2, max_tokens=40))
        under_way.append(engine.submit(request))
        for _ in range(int(draws.integers(3))):
            engine.run_step()
        if len(under_way) > int(draws.integers(6)):
            engine.abort(under_way.pop(int(draws.integers(len(under_way)))))
            aborted += 1
    for answer in under_way:
        engine.abort(answer)
    settle(engine)
    assert free_pages(engine) == before


def test_an_answer_that_has_ended_may_be_aborted(engine):
    [answer] = engine.run([Request(PROMPT, DRAWN)])
    before = tokens(answer.samples[0])
    engine.abort(answer)
    assert answer.samples[0].error is None
    assert tokens(answer.samples[0]) == before


def test_a_request_ends_at_its_deadline(engine):
    answer = engine.submit(Request(PROMPT, DRAWN, deadline=1e-3))
    time.sleep(2e-3)
    settle(engine)
    assert answer.samples[0].error == "deadline"


def test_logits_that_are_not_numbers_end_their_request_alone(params):
    broken = dict(params)
    table = np.array(params["embed"]["embedding"])
    table[77] = np.nan
    broken["embed"] = {"embedding": jnp.asarray(table)}
    engine = Engine(CONFIG, broken, BYTES, SERVE)
    bad, good = engine.run([Request((5, 77, 6), DRAWN), Request(PROMPT, DRAWN)])
    assert bad.samples[0].error == "its logits are not numbers"
    assert good.samples[0].error is None
    assert len(tokens(good.samples[0])) == 10


def test_other_parameters_are_used_from_the_next_step_on(params):
    others = random_params(CONFIG, seed=9)
    engine = Engine(CONFIG, params, BYTES, SERVE)
    prompt = tuple(range(200))
    first = one(engine, Request(prompt, DRAWN))
    engine.update_params(others)
    fresh = one(Engine(CONFIG, others, BYTES, SERVE), Request(prompt, DRAWN))
    again = one(engine, Request(prompt, DRAWN))
    assert tokens(again) == tokens(fresh) != tokens(first)
    assert [each.logprob for each in again.logprobs] == [each.logprob for each in fresh.logprobs]


def test_a_shared_prompt_is_read_once(engine):
    settle(engine)
    prompt = tuple(np.random.default_rng(0).integers(0, 200, 300).tolist())
    one(engine, Request(prompt, DRAWN))
    [replica] = engine.replicas
    before = replica.num_rows
    one(engine, Request((*prompt[:290], 1, 2), DRAWN))
    # The full pages of what is the same are there, and the last token of an answer is never read.
    shared = 290 // PAGE_SIZE * PAGE_SIZE
    assert replica.num_rows - before == 292 - shared + 9
    before = replica.num_rows
    one(engine, Request((*prompt[:290], 1, 2), DRAWN, salt="another tenant"))
    assert replica.num_rows - before == 292 + 9


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ids": (1, 260)}, "ids: id 260 is out of range: it must lie in [0, 260)."),
        ({"ids": ()}, "ids: a prompt has one id at least."),
        ({"count": 0}, "count = 0 must be at least 1."),
        ({"count": 3, "best_of": 2}, "best_of = 2 must not be below count."),
        ({"logprobs": 9}, "logprobs = 9 must lie in [0, 8]."),
        ({"deadline": 0.0}, "deadline = 0.0 must be above 0."),
        ({"deadline": float("nan")}, "deadline = nan must be above 0."),
        ({"count": 1025}, "count = 1025 must be at most 1024."),
        (
            {"sampling": SamplingConfig(max_tokens=600)},
            "max_tokens = 600 after a prompt of 20 tokens is more than the model's max_length = 512"
            ". Use at most 492.",
        ),
        (
            {"sampling": SamplingConfig(stop_ids=(300,))},
            "stop_ids: id 300 is out of range: it must lie in [0, 259).",
        ),
        (
            {"beams": BeamConfig(num_beams=5)},
            "num_beams = 5 must be at most 4, the engine's slots.",
        ),
        (
            {"beams": BeamConfig(num_beams=2, max_tokens=8), "count": 2},
            "count = 2 is of answers that are drawn, and beams searches.",
        ),
    ],
)
def test_what_cannot_be_answered_is_refused_before_anything_is_queued(engine, change, said):
    fields = {"ids": PROMPT, **change}
    with pytest.raises(UserError) as caught:
        engine.submit_all([Request(PROMPT, DRAWN), Request(**fields)])
    assert str(caught.value) == said
    assert not engine.run_step()


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.thorough)])
def test_nothing_is_compiled_after_the_start(params, caplog, count: int):
    engine = Engine(CONFIG, params, BYTES, dataclasses.replace(SERVE, drafts=2, speculate="lookup"))
    one(engine, Request(PROMPT, DRAWN))
    draws = np.random.default_rng(0)
    letters = GrammarConfig(regex="[a-z ]*")
    requests = []
    for index in range(count):
        longest = 40 if index % 20 else 300
        prompt = tuple(draws.integers(0, 200, int(draws.integers(1, longest))).tolist())
        if index % 10 == 0:
            requests.append(
                Request(prompt, beams=BeamConfig(num_beams=3, max_tokens=5, min_tokens=2))
            )
            continue
        sampling = SamplingConfig(
            max_tokens=int(draws.integers(1, 12)),
            temperature=float(draws.choice([0.0, 0.8])),
            top_k=int(draws.choice([0, 7])),
            top_p=float(draws.choice([1.0, 0.9])),
            min_p=float(draws.choice([0.0, 0.1])),
            typical_p=float(draws.choice([1.0, 0.8])),
            presence_penalty=float(draws.choice([0.0, 0.3])),
            logit_bias=((3, 1.0),) if index % 3 else (),
            seed=index,
        )
        requests.append(
            Request(
                prompt,
                sampling,
                count=1 + index % 2,
                logprobs=index % 4,
                kept=index % 5 == 0,
                grammar=letters if index % 7 == 0 else None,
                prompt_logprobs=1 if index % 11 == 0 else None,
            )
        )
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        engine.run(requests)
    assert "Compiling" not in caplog.text
    assert "compiled while serving" not in caplog.text
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        jax.jit(lambda x: x + 1)(jnp.zeros(3))  # the control
    assert "Compiling" in caplog.text


def test_parameters_of_a_checkpoint_compile_nothing_after_the_start(params, caplog):
    # They were put on a device. Nobody else has so many slots, whose programs would be there.
    put = jax.device_put(params, jax.devices()[0])
    serve = ServeConfig(
        slots=5, tokens=256, rows=16, tiles=(8,), drafts=2, speculate="first_layers", draft_layers=1
    )
    engine = Engine(CONFIG, put, BYTES, serve)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        engine.run([Request(PROMPT, DRAWN), Request((1, 2), DRAWN)])
    assert "Compiling" not in caplog.text


def test_a_compilation_while_serving_is_logged_as_an_error(engine, caplog, monkeypatch):
    [replica] = engine.replicas
    run_step = replica.run_step

    def compile_too() -> bool:
        jax.jit(lambda x: x - 17)(jnp.zeros(3)).block_until_ready()
        return run_step()

    jax.jit(lambda x: x - 18)(jnp.zeros(3))  # the control: between steps it is nobody's
    monkeypatch.setattr(replica, "run_step", compile_too)
    engine.run_step()
    found = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(found) == 1
    assert "compiled while serving" in found[0].getMessage()

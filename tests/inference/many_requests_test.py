"""What waits costs the steps nothing, and nothing is kept of what has ended."""

import time

import numpy as np
import pytest

from research.data.tokenizers import ByteTokenizer
from research.inference.answers import Answer
from research.inference.beam_config import BeamConfig
from research.inference.engine import Engine
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.scheduler import Scheduler
from research.inference.serve_config import ServeConfig
from tests.tiny import random_params, tiny_config

BYTES = ByteTokenizer()
CONFIG = tiny_config(vocab_size=260, max_length=96)
SERVE = ServeConfig(slots=4, tokens=512, rows=16, tiles=(8,), top_logprobs=8)
SHORT = SamplingConfig(max_tokens=3, seed=0)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(CONFIG, random_params(CONFIG), BYTES, SERVE)


def asked_in_a_step(engine: Engine, count: int, monkeypatch: pytest.MonkeyPatch) -> float:
    """Returns how often a step asks whether an answer or a sequence is at its end, or in turn."""
    calls = 0

    def counted(was):
        def call(*args):
            nonlocal calls
            calls += 1
            return was(*args)

        return call

    answers = [engine.submit(Request((1, 2, index % 200), SHORT)) for index in range(count)]
    with monkeypatch.context() as patch:
        patch.setattr(Answer, "finished", property(counted(Answer.finished.fget)))
        patch.setattr(Scheduler, "_follows", counted(Scheduler._follows))
        for _ in range(10):
            engine.run_step()
    for answer in answers:
        engine.abort(answer)
    return calls / 10


def test_a_step_asks_nothing_of_requests_that_wait(engine, monkeypatch):
    few = asked_in_a_step(engine, 40, monkeypatch)
    assert few > 1  # the control: it is counted
    assert asked_in_a_step(engine, 400, monkeypatch) == few


def test_nothing_is_kept_of_answers_that_have_ended(engine):
    [replica] = engine.replicas
    draws = np.random.default_rng(1)
    answers = []
    for index in range(60):
        prompt = tuple(draws.integers(0, 200, int(draws.integers(1, 40))).tolist())
        request = Request(prompt, SHORT, count=1 + index % 2, deadline=60.0)
        if index % 7 == 0:
            request = Request(prompt, beams=BeamConfig(num_beams=2, max_tokens=3), deadline=60.0)
        answers.append(engine.submit(request))
    assert replica.members.load > 0
    for answer in answers[::5]:
        engine.abort(answer)
    while engine.run_step():
        pass
    assert all(answer.finished for answer in answers)
    assert len(replica.members) == 0
    assert replica.members.load == 0
    assert not replica.members._timed
    assert not engine._replica_of


def test_the_earliest_deadline_is_kept_first(engine):
    late, early = 60.0, 0.02
    slow = engine.submit(Request((1, 2), SamplingConfig(max_tokens=90, seed=0), deadline=late))
    fast = engine.submit(Request((3, 4), SamplingConfig(max_tokens=90, seed=0), deadline=early))
    engine.run_step()
    time.sleep(0.03)
    engine.run_step()
    assert [each.samples[0].error for each in (slow, fast)] == [None, "deadline"]
    engine.abort(slow)

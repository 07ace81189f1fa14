"""A step that is broken off changes no answer, and requests that cannot be answered begin none."""

import dataclasses
import hashlib
import json
import pathlib
import signal
import subprocess
import sys

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.data.tokenizers import ByteTokenizer
from research.inference.answers import Sample
from research.inference.beam_config import BeamConfig
from research.inference.beam_lanes import BeamLanes
from research.inference.engine import Engine
from research.inference.members import FEW_DEADLINES
from research.inference.page_names import PageNames
from research.inference.replica import Replica
from research.inference.requests import Request
from research.inference.runner import Runner
from research.inference.sampling_config import SamplingConfig
from research.inference.scheduler import Scheduler
from research.inference.serve_config import ServeConfig
from research.inference.text import Detokenizer
from research.inference.under_way import UnderWay
from tests.inference import wrong_requests
from tests.models.variants import VARIANTS
from tests.tiny import random_params, tiny_config

BYTES = ByteTokenizer()
CONFIG = tiny_config(vocab_size=260, max_length=128)
SERVE = ServeConfig(slots=3, tokens=512, rows=12, tiles=(4,), top_logprobs=8)
PROMPT = tuple(range(5, 45))
REQUESTS = [
    Request(PROMPT, SamplingConfig(max_tokens=20, seed=1)),
    Request((*PROMPT[:35], 9), SamplingConfig(max_tokens=20, temperature=0.0)),
    Request(PROMPT[:7], beams=BeamConfig(num_beams=2, max_tokens=8)),
]


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def engine_of(params, **fields) -> Engine:
    # Those that other engines know have their pages.
    serve = dataclasses.replace(SERVE, transfers="params_digest" in fields)
    return Engine(CONFIG, params, BYTES, serve, **fields)


def texts(answers) -> list:
    found = []
    for answer in answers:
        if answer.beams is not None:
            found.append([(beam.tokens, beam.score) for beam in answer.beams])
        else:
            [sample] = answer.samples
            found.append((sample.completion().tokens, sample.logprobs, sample.error))
    return found


@pytest.fixture(scope="module")
def expected(params) -> list:
    return texts(engine_of(params).run(REQUESTS))


@pytest.mark.parametrize("at", ["read", "draw", "after the read of a step"])
@pytest.mark.parametrize("step", [0, 1, 4, 9])
def test_a_step_that_is_broken_off_may_be_run_again(params, expected, at, step, monkeypatch):
    engine = engine_of(params)
    answers = engine.submit_all(REQUESTS)
    for _ in range(step):
        engine.run_step()

    read = Runner.read

    def broken(self, *arguments):
        if at == "after the read of a step":
            read(self, *arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "draw" if at == "draw" else "read", broken)
        with pytest.raises(KeyboardInterrupt):
            engine.run_step()
    while not all(answer.finished for answer in answers):
        engine.run_step()
    assert texts(answers) == expected
    # Nobody finds pages that were not written.
    assert texts(engine.run(REQUESTS)) == expected


# Without the search, whose steps are read before the next begins.
SAMPLED = REQUESTS[:2]


@pytest.mark.parametrize("step", [4, 7])
@pytest.mark.parametrize("at", ["read", "draw"])
def test_what_is_under_way_is_not_taken_twice(params, expected, at, step, monkeypatch):
    engine = engine_of(params)
    answers = engine.submit_all(SAMPLED)
    for _ in range(step):
        engine.run_step()
    assert engine.replicas[0].under_way

    def broken(self, *_):
        # As where a program has taken the arrays that it was given.
        taken = self._slots if at == "draw" else self.state
        for leaf in jax.tree.leaves(taken):
            leaf.delete()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Runner, at, broken)
        with pytest.raises(KeyboardInterrupt):
            engine.run_step()
    while not all(answer.finished for answer in answers):
        engine.run_step()
    assert texts(answers) == expected[:2]


# Where the host changes what it knows: a signal comes when all of it is done.
HALFWAY = {
    "text": (Detokenizer, "push"),
    "sample": (Sample, "push"),
    "collected": (BeamLanes, "collect"),
    "advanced": (BeamLanes, "advance"),
    "planned": (Scheduler, "_take"),
}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("where", HALFWAY)
def test_a_signal_breaks_off_no_change(params, expected, where, before, monkeypatch):
    owner, name = HALFWAY[where]
    engine = engine_of(params)
    answers = engine.submit_all(REQUESTS)
    whole = getattr(owner, name)
    signals = iter([signal.SIGINT])

    def signalled(*arguments):
        if before:
            for number in signals:
                signal.raise_signal(number)
        found = whole(*arguments)
        for number in signals:
            signal.raise_signal(number)
        return found

    monkeypatch.setattr(owner, name, signalled)
    interrupted = 0
    for _ in range(200):
        try:
            engine.run_step()
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted == 1
    assert texts(answers) == expected
    assert len(engine.replicas[0].members) == 0


def test_an_update_that_is_broken_off_changes_nothing(params, expected, monkeypatch):
    engine = engine_of(params)
    answers = engine.submit_all(REQUESTS)
    for _ in range(6):
        engine.run_step()
    read = UnderWay.read

    def broken(step):
        monkeypatch.setattr(UnderWay, "read", read)
        raise KeyboardInterrupt

    monkeypatch.setattr(UnderWay, "read", broken)
    with pytest.raises(KeyboardInterrupt):
        engine.update_params(random_params(CONFIG, seed=3))
    while not all(answer.finished for answer in answers):
        engine.run_step()
    assert texts(answers) == expected


def test_new_parameters_that_were_put_nowhere_compile_nothing(params, caplog):
    engine = engine_of(jax.device_put(params, jax.local_devices()[0]))
    nowhere = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) * 2), params)
    engine.update_params(nowhere)
    engine.run(SAMPLED)
    assert "compiled while serving" not in caplog.text


def test_parameters_from_the_host_are_copied_whatever_holds_them(params):
    doubled = jax.tree.map(lambda leaf: np.array(leaf) * 2, params)
    engine = engine_of(jax.tree.map(np.array, params))
    engine.update_params(flax.core.freeze(doubled))
    found = texts(engine.run(SAMPLED))
    expected = jax.tree.map(np.array, doubled)
    for leaf in jax.tree.leaves(doubled):
        leaf[...] = 0
    again = [dataclasses.replace(request, salt="again") for request in SAMPLED]
    assert found == texts(engine.run(again)) == texts(engine_of(expected).run(SAMPLED))


def test_what_nobody_reads_or_waits_for_is_not_under_way(params, monkeypatch):
    engine = engine_of(params)
    [replica] = engine.replicas
    engine.stream(SAMPLED[0]).close()
    assert len(replica.members) == 0

    submit = Replica.submit
    submitted = iter([submit])

    def broken(*arguments):
        for whole in submitted:
            return whole(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Replica, "submit", broken)
        with pytest.raises(KeyboardInterrupt):
            engine.run(SAMPLED)
    assert len(replica.members) == 0

    timed = dataclasses.replace(SAMPLED[0], sampling=SamplingConfig(max_tokens=1), deadline=1e6)
    for _ in range(10):
        engine.run([timed] * 20)
    assert len(replica.members._deadlines) <= FEW_DEADLINES


def test_experts_of_limited_capacity_are_refused():
    config = dataclasses.replace(VARIANTS["experts"], vocab_size=260)
    experts = dataclasses.replace(config.experts, capacity_factor=1.0)
    config = dataclasses.replace(config, experts=experts)
    with pytest.raises(UserError, match=r"capacity_factor = 1\.0 drops tokens"):
        Engine(config, random_params(config), BYTES, SERVE)


def test_a_step_whose_arrays_were_taken_is_run_again(params, expected, monkeypatch):
    engine = engine_of(params)
    answers = engine.submit_all(REQUESTS)
    for _ in range(3):
        engine.run_step()

    def broken(self, *_):
        for leaf in jax.tree.leaves(self.state):
            leaf.delete()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "read", broken)
        with pytest.raises(KeyboardInterrupt):
            engine.run_step()
    while not all(answer.finished for answer in answers):
        engine.run_step()
    assert texts(answers) == expected


def test_a_run_that_is_broken_off_leaves_nothing(params, monkeypatch):
    engine = engine_of(params)
    [replica] = engine.replicas
    before = replica.available_pages

    def broken(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "draw", broken)
        with pytest.raises(KeyboardInterrupt):
            engine.run(REQUESTS)
    assert len(replica.members) == 0
    assert replica.available_pages == before


def test_streams_beside_each_other_have_their_whole_texts(params):
    engine = engine_of(params)
    short, long, _ = REQUESTS
    short = dataclasses.replace(short, sampling=SamplingConfig(max_tokens=3, seed=0))
    [whole] = engine.run([short])
    first = engine.stream(short)
    second = engine.stream(long)
    text = next(first).samples[0].take_text()
    for _ in second:
        pass
    for answer in first:
        text += answer.samples[0].take_text()
    assert text == whole.samples[0].completion().text
    with pytest.raises(UserError):
        engine.stream(Request((999,)))


def test_a_request_of_wrong_types_is_refused_by_its_field():
    # In a process of its own, whose functions do not check the types of their arguments.
    command = [sys.executable, "-m", wrong_requests.__name__]
    root = pathlib.Path(__file__).parents[2]
    found = subprocess.run(command, cwd=root, text=True, capture_output=True)
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout)
    assert set(said) == set(wrong_requests.WRONG)
    for what, (field, _) in wrong_requests.WRONG.items():
        assert said[what].startswith(field), (what, said[what])


@pytest.fixture(scope="module")
def shared_engine(params) -> Engine:
    return engine_of(params)


def test_parameters_of_another_shape_or_type_are_refused(params, shared_engine):
    halved = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), params)
    with pytest.raises(UserError, match=r"params: .* is bfloat16\[.*\] and was float32\["):
        shared_engine.update_params(halved)
    with pytest.raises(UserError, match="is missing and was"):
        shared_engine.update_params({"embed": params["embed"]})


DYNAMIC = dataclasses.replace(CONFIG, position=VARIANTS["dynamic"].position)


def name_of(config=CONFIG, digest=b"d", limit=50, adapters=None, request=None, **serve):
    fields = dataclasses.replace(SERVE, **serve)
    names = PageNames(
        config, fields.of_structure(config.structure), digest, adapters or {"one": b"1"}
    )
    return names.start(request or Request(PROMPT), limit)


def test_pages_are_named_by_all_that_decides_their_keys():
    same = name_of()
    assert same == name_of(slots=2, rows=9)  # the control: what decides nothing
    assert same == name_of(limit=60)
    others = [
        name_of(config=dataclasses.replace(CONFIG, max_length=64)),
        name_of(digest=b"e"),
        name_of(cache_dtype="int8"),
        name_of(invariant=False),
        name_of(tiles=(8,)),
        name_of(request=Request(PROMPT, salt="a")),
        name_of(request=Request(PROMPT, salt="\ud800")),
        name_of(request=Request(PROMPT, adapter="one")),
        name_of(config=DYNAMIC),
        name_of(config=DYNAMIC, limit=60),
    ]
    assert len({same, *others}) == 1 + len(others)
    assert name_of(request=Request(PROMPT, adapter="one"), adapters={"one": b"2"}) not in others


def test_pages_of_a_running_answer_are_renamed_with_the_parameters(params):
    newer = random_params(CONFIG, seed=3)
    engine = engine_of(params, params_digest=b"1")
    request = dataclasses.replace(REQUESTS[0], sampling=SamplingConfig(max_tokens=30, seed=0))
    answer = engine.submit(request)
    for _ in range(6):
        engine.run_step()
    engine.update_params(newer, b"2")
    while not answer.finished:
        engine.run_step()
    exported = engine.export_pages(request)
    fresh = engine_of(newer, params_digest=b"2")
    fresh.import_pages(request, exported)
    assert texts(fresh.run([request])) == texts(engine_of(newer).run([request]))
    with pytest.raises(UserError, match=r"pages\.digest"):
        engine_of(params, params_digest=b"1").import_pages(request, exported)


def test_pages_without_their_bytes_take_no_room(params):
    sender = engine_of(params, params_digest=b"1")
    sender.run(REQUESTS[:1])
    exported = sender.export_pages(REQUESTS[0])
    data = exported.data[:-4]
    short = dataclasses.replace(exported, data=data, sha256=hashlib.sha256(data).digest())
    engine = engine_of(params, params_digest=b"1")
    before = engine.replicas[0].available_pages
    with pytest.raises(UserError, match=r"pages\.data must have \d+ bytes"):
        engine.import_pages(REQUESTS[0], short)
    assert engine.replicas[0].available_pages == before

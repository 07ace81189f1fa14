"""Layers with a window have pages of their own beside layers without one, and no answer is another:
not behind many windows, nor where pages run out, are found again, or are shared by forks.
"""

import dataclasses
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest

from research.bench.exactness_answers import Found
from research.bench.exactness_models import MODELS, random_params
from research.data.tokenizers import ByteTokenizer
from research.inference import replica, runner
from research.inference.beam_config import BeamConfig
from research.inference.engine import Engine
from research.inference.page_kinds import PageKind, pages_at_once
from research.inference.pages import PagePool
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.scheduler import Scheduler
from research.inference.serve_config import ServeConfig
from research.kernels.decode_attention import PAGE_SIZE
from research.models.config import LayerConfig, ModelConfig
from tests.tiny import logits, tiny_config
from tests.tiny import random_params as tiny_params

GEMMA = MODELS["Gemma"]
WINDOW = 20
# Texts of six windows, of which steps take half a window.
SERVE = ServeConfig(slots=4, tokens=1024, rows=12, tiles=(8,), top_logprobs=8)
LEAST = pages_at_once(WINDOW, SERVE.rows, PAGE_SIZE)
PER_TEXT = GEMMA.max_length // PAGE_SIZE


def requests() -> list[Request]:
    """Texts that begin alike for three windows, some of them with forks: several samples, beams."""
    draws = np.random.default_rng(3)
    begin = draws.integers(0, 256, 70).tolist()
    found = []
    for index, own in enumerate((1, 12, 20, 7)):
        ids = (*begin, *draws.integers(0, 256, own).tolist())
        left = GEMMA.max_length - len(ids)
        sampling = SamplingConfig(max_tokens=left, min_tokens=left - 3, seed=index)
        found.append(Request(ids, sampling, count=1 + index % 2, logprobs=2))
    beams = BeamConfig(num_beams=3, max_tokens=40, min_tokens=36, num_return=3)
    found.append(Request(tuple(begin[:40]), beams=beams))
    return found


def engine_of(config: ModelConfig, params: Any, **changes: Any) -> Engine:
    return Engine(config, params, ByteTokenizer(), dataclasses.replace(SERVE, **changes))


def answered(engine: Engine, asked: list[Request]) -> list[Found]:
    return [Found.of(answer) for answer in engine.run(asked)]


def differing(found: list[Found], wanted: list[Found]) -> int:
    return sum(one.compare(other).differing for one, other in zip(found, wanted, strict=True))


@pytest.fixture(scope="module")
def params() -> Any:
    return random_params(GEMMA)


@pytest.fixture(scope="module")
def wanted(params: Any) -> list[Found]:
    """The answers of each request alone, where all layers have one pool and keep all tokens."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "windows_of", lambda config, keeps_all: (0,))
        engine = engine_of(GEMMA, params, prefix_cache=False)
        assert len(engine.replicas[0].available_pages) == 1
        return [answered(engine, [request])[0] for request in requests()]


@pytest.fixture
def lost(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """How often each kind of layers had no page left."""
    counts: Counter[int] = Counter()
    make_room = Scheduler._make_room

    def count(scheduler: Scheduler, sequence: Any, pool: PagePool) -> bool:
        if not pool.available:
            counts[[kind.pool for kind in scheduler.kinds].index(pool)] += 1
        return make_room(scheduler, sequence, pool)

    monkeypatch.setattr(Scheduler, "_make_room", count)
    return counts


def with_pools(monkeypatch: pytest.MonkeyPatch, *counts: int) -> None:
    """Has an engine's pools hand out no more than so many pages of each kind."""
    left = list(counts)
    monkeypatch.setattr(replica, "PagePool", lambda count: PagePool(1 + left.pop(0)))


def test_answers_are_those_of_one_pool_cold_and_warm(params: Any, wanted: list[Found], lost: Any):
    engine = engine_of(GEMMA, params)
    full, windowed = engine.replicas[0].available_pages
    # A small pool, which is enough for all slots at once.
    assert (full, windowed) == (SERVE.tokens // PAGE_SIZE, 2 * SERVE.slots * LEAST)
    rows = []
    for _ in range(2):
        before = engine.replicas[0].num_rows
        assert not differing(answered(engine, requests()), wanted)
        rows.append(engine.replicas[0].num_rows - before)
    assert not lost
    # The second time pages are found that were released in between.
    assert rows[1] < rows[0] - 2 * PAGE_SIZE
    while engine.run_step():
        pass
    assert engine.replicas[0].available_pages == (full, windowed)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("pools", "kind"),
    [((64, 2 * LEAST), 1), ((PER_TEXT, 8 * LEAST), 0)],
    ids=["few windowed", "few full"],
)
def test_answers_are_those_of_one_pool_where_pages_run_out(
    params: Any, wanted: list[Found], lost: Any, monkeypatch: Any, pools: Any, kind: int
):
    with_pools(monkeypatch, *pools)
    engine = engine_of(GEMMA, params)
    assert not differing(answered(engine, requests()), wanted)
    assert lost[kind] > 2
    assert engine.replicas[0].available_pages == pools


@pytest.mark.thorough
def test_a_page_that_is_released_too_early_is_found(
    params: Any, wanted: list[Found], monkeypatch: Any
):  # the control
    first_at = PageKind.first_at

    def later(kind: PageKind, position: int) -> int:
        return min(first_at(kind, position + PAGE_SIZE), position // PAGE_SIZE)

    monkeypatch.setattr(PageKind, "first_at", later)
    assert differing(answered(engine_of(GEMMA, params), requests()), wanted)


@pytest.mark.fast_cases("some layers")
@pytest.mark.parametrize("has_full", [False, True], ids=["all layers", "some layers"])
def test_layers_with_windows_keep_no_pages_before_them(has_full: bool):
    window = 20
    pattern = (LayerConfig(window=window), *[LayerConfig()] * has_full)
    config = tiny_config(vocab_size=260, max_length=512, num_layers=2, pattern=pattern)
    serve = ServeConfig(slots=4, tokens=1024, rows=16, tiles=(2, 8))
    params = tiny_params(config)
    prompt = tuple(np.random.default_rng(4).integers(0, 200, 150).tolist())
    asked = [Request(prompt, SamplingConfig(max_tokens=200, seed=seed)) for seed in (1, 2)]
    engine = Engine(config, params, ByteTokenizer(), serve)
    answers = [engine.submit(request) for request in asked]
    before = np.array(engine.replicas[0].available_pages)
    most = 0 * before
    while engine.run_step():
        most = np.maximum(most, before - engine.replicas[0].available_pages)
    # The window and a step's tokens for each of the two, of 350 tokens.
    *full, windowed = most
    assert windowed <= 2 * (-(-(window + serve.rows) // PAGE_SIZE) + 1) < 350 // PAGE_SIZE
    # The others keep all.
    assert len(full) == has_full
    assert all(count > 350 // PAGE_SIZE for count in full)
    for request, answer in zip(asked, answers, strict=True):
        sample = answer.samples[0]
        inputs = np.array([(*prompt, *sample.completion().tokens)], np.int32)
        expected = jax.nn.log_softmax(logits(config, params, inputs)[0], axis=-1)
        places = np.arange(len(prompt), inputs.shape[1])
        wanted = np.asarray(expected)[places - 1, inputs[0, places]]
        np.testing.assert_allclose([each.logprob for each in sample.logprobs], wanted, atol=1e-5)
        [alone] = Engine(config, params, ByteTokenizer(), serve).run([request])
        assert alone.samples[0].logprobs == sample.logprobs

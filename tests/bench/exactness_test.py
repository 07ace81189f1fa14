"""Drawn requests are answered alike under every condition, and three faults are found."""

import argparse
import dataclasses
import json

import numpy as np
import pytest

from research.bench import exactness
from research.bench.drawn_requests import draw_requests
from research.bench.exactness_answers import Count, Found, largest
from research.bench.exactness_models import LENGTH, MODELS, random_params
from research.bench.exactness_numbers import largest_error, mesh_error, page_size_error
from research.bench.exactness_runs import (
    CONDITIONS,
    Condition,
    answer_alone,
    compare_conditions,
    compare_engines,
    few_engines,
    narrow_engines,
)
from research.core.errors import UserError
from research.data.tokenizers import ByteTokenizer
from research.inference import page_names, replica, runner
from research.inference.engine import Engine
from research.inference.grammar_config import GrammarConfig
from research.inference.requests import Request
from research.inference.sampling_config import SamplingConfig
from research.inference.serve_config import ServeConfig
from research.inference.slots import LogprobKind

LLAMA = MODELS["LLaMA"]
# Few tokens for four sequences, with guesses.
SERVE = ServeConfig(
    slots=4, tokens=LENGTH, rows=16, tiles=(2, 8), drafts=3, speculate="lookup", top_logprobs=8
)
MIXED = Condition(mixed=True)


@pytest.fixture(scope="module")
def params():
    return random_params(LLAMA)


@pytest.fixture(scope="module")
def requests():
    return draw_requests(LLAMA, 40)


@pytest.fixture(scope="module")
def alone(params, requests):
    return answer_alone(LLAMA, params, requests, SERVE)


@pytest.fixture(scope="module")
def wanted(alone):
    return [Found.of(answer) for answer in alone]


def compare(params, requests, wanted, conditions, serve=SERVE) -> Count:
    engine = Engine(LLAMA, params, ByteTokenizer(), serve)
    total = Count()
    for _, count in compare_conditions(engine, requests, wanted, conditions):
        total.add(count)
    return total


def test_answers_are_bit_for_bit_those_of_the_request_alone(params, requests, wanted):
    found = compare(params, requests, wanted, CONDITIONS)
    assert (found.answers, found.numbers) == (40, sum(len(each.numbers) for each in wanted))
    assert (found.differing, found.bits) == (0, 0), found.first
    # The conditions came to pass.
    assert found.preempted > 0
    assert found.guessed_right > 0


def test_log_probabilities_are_those_of_the_whole_text(params, requests, alone):
    compared, error = largest_error(LLAMA, params, requests, alone)
    assert compared > 300
    assert error < exactness.TOLERANCE
    _, other = largest_error(LLAMA, random_params(LLAMA, seed=1), requests, alone)
    assert other > 1  # the control


def test_pages_of_other_sizes_change_no_token(params, requests, wanted):
    error = page_size_error(LLAMA, params, requests[:20], wanted[:20], SERVE)
    assert 0 < error < exactness.TOLERANCE
    # The control.
    other = page_size_error(LLAMA, random_params(LLAMA, seed=1), requests[:4], wanted[:4], SERVE)
    assert other == np.inf


def test_two_replicas_of_two_devices_change_no_token(params, requests, wanted):
    error = mesh_error(LLAMA, params, requests[:12], wanted[:12], SERVE)
    assert 0 < error < exactness.TOLERANCE
    # The control.
    others = random_params(LLAMA, seed=1)
    assert mesh_error(LLAMA, others, requests[:4], wanted[:4], SERVE) == np.inf


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["Gemma", "DeepSeek-V3", "T5"])
def test_a_model_in_16_bits_answers_alike_under_every_condition(name):
    config = dataclasses.replace(MODELS[name], dtype="bfloat16", param_dtype="bfloat16")
    params = random_params(config)
    requests = draw_requests(config, len(CONDITIONS))
    settings = few_engines(config)[1:2]
    wanted = [Found.of(each) for each in answer_alone(config, params, requests, settings[0])]
    found = compare_engines(config, params, requests, wanted, settings)
    assert (found.differing, found.bits) == (0, 0), found.first


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["Mistral", "Gemma"])
def test_pages_that_are_released_behind_windows_change_no_answer(name, monkeypatch):
    # The host changes its table of pages while the device reads.
    config = MODELS[name]
    params = random_params(config)
    requests = draw_requests(config, len(CONDITIONS))
    serve = few_engines(config)[3]
    # All layers have one pool, and keep all tokens.
    with monkeypatch.context() as patch:
        patch.setattr(runner, "windows_of", lambda config, keeps_all: (0,))
        wanted = [Found.of(each) for each in answer_alone(config, params, requests, serve)]
    found = compare_engines(config, params, requests, wanted, [serve] * 2)
    assert (found.differing, found.bits) == (0, 0), found.first
    assert found.preempted > 0


@pytest.mark.thorough
def test_steps_of_one_tile_and_of_several_compute_a_row_alike():
    # With the passes of XLA that users get, Gemma's norms are where a single tile is found.
    config = MODELS["Gemma"]
    params = random_params(config)
    requests = draw_requests(config, 16)
    one, _, several, *_ = few_engines(config)
    assert one.rows == one.tiles[-1] < several.rows
    wanted = [Found.of(each) for each in answer_alone(config, params, requests, one)]
    found = compare_engines(config, params, requests, wanted, [several])
    assert (found.differing, found.bits) == (0, 0), found.first


def test_a_step_has_the_arrays_of_two_tiles_at_least():
    assert dataclasses.replace(SERVE, slots=2, rows=8).padded_rows() == 16
    assert dataclasses.replace(SERVE, rows=20).padded_rows() == 24
    assert dataclasses.replace(SERVE, rows=20, invariant=False).padded_rows() == 20


def test_what_a_grammar_allows_says_nothing_of_the_prompt(params):
    pytest.importorskip("llguidance")
    sampling = SamplingConfig(max_tokens=8, top_k=5, seed=0)
    asked = Request(
        tuple(range(40)),
        sampling,
        grammar=GrammarConfig(choices=("yes", "no")),
        prompt_logprobs=2,
        logprob_kind=LogprobKind.PROCESSED,
        kept=True,
    )
    # In chunks of 16 tokens, and in one.
    found = []
    for rows in (16, 64):
        engine = Engine(LLAMA, params, ByteTokenizer(), dataclasses.replace(SERVE, rows=rows))
        found += engine.run([asked])
    small, large = map(Found.of, found)
    assert not small.compare(large).differing
    kept = [each.kept for each in found[0].prompt_logprobs.values()]
    assert all(np.bitwise_count(each).sum() >= 5 for each in kept)


def test_tiles_that_compute_otherwise_are_found(params, requests, wanted):
    # Without the probe, one row or all of them at once.
    serve = dataclasses.replace(SERVE, tiles=(1,), rows=24, invariant=False)
    found = compare(params, requests, wanted, [MIXED], serve)
    if not found.bits:
        pytest.skip("one row and 24 are computed alike on this machine")
    assert found.differing


def test_a_digest_without_the_length_that_keys_go_by_is_found(params, monkeypatch):
    def without_limit(fields):
        return chain_start({name: field for name, field in fields.items() if name != "limit"})

    # One prompt of several pages, whose keys are others where a text may be longer.
    lengths = (6, 20)
    asked = [Request(tuple(range(40)), SamplingConfig(max_tokens=each, seed=0)) for each in lengths]
    wanted = [Found.of(each) for each in answer_alone(LLAMA, params, asked, SERVE)]
    warm = [Condition(mixed=True, warm=True)]
    assert not compare(params, asked, wanted, warm).differing
    chain_start = page_names.chain_start
    monkeypatch.setattr(page_names, "chain_start", without_limit)
    assert compare(params, asked, wanted, warm).differing


def test_draws_that_go_by_the_slot_are_found(params, requests, wanted, monkeypatch):
    def keyed_by_slot(sequence, sampling, seed, *others):
        return one_slot(sequence, sampling, sequence.slot, *others)

    one_slot = replica.one_slot
    monkeypatch.setattr(replica, "one_slot", keyed_by_slot)
    assert compare(params, requests, wanted, [MIXED]).differing > 10


def test_a_streamed_text_that_lacks_a_part_is_found(alone):
    engine_answer = alone[0]
    found = Found.of(engine_answer)
    other = Found([*found.told, "streamed as ''"], found.numbers)
    assert other.compare(found).differing == 1
    numbers = found.numbers.copy()
    numbers[0] = np.nextafter(numbers[0], np.float32(0))
    assert Found(found.told, numbers).compare(found).bits > 0


@pytest.mark.parametrize("name", ["GPT-2", "T5"])
def test_drawn_requests_fit_the_engine_and_have_every_option(name):
    config = MODELS[name]
    requests = draw_requests(config, 400)
    assert requests[:10] == draw_requests(config, 10)
    for request in requests:
        request.check(config, ByteTokenizer().vocab_size, SERVE)
    sampled = [each for each in requests if each.beams is None]
    for field in dataclasses.fields(sampled[0].sampling):
        assert len({getattr(each.sampling, field.name) for each in sampled}) > 1, field.name
    for name in ("beams", "grammar", "count", "best_of", "logprobs", "logprob_kind", "kept"):
        assert len({repr(getattr(each, name)) for each in requests}) > 1, name
    lengths = {len(each.ids) + each.max_tokens for each in sampled}
    assert max(lengths) >= LENGTH


def test_a_number_that_is_none_is_infinitely_far():
    found = Found([], np.array([1.0, -np.inf], np.float32))
    assert found.distance(found) == 0
    assert found.distance(Found([], np.array([1.5, -np.inf], np.float32))) == 0.5
    assert found.distance(Found([], np.array([1.0, np.nan], np.float32))) == np.inf
    assert largest([0.1, np.nan]) == np.inf
    assert largest([]) == 0


def test_narrow_engines_have_narrow_pages():
    few = few_engines(LLAMA)
    narrow = narrow_engines(LLAMA, "int8")
    assert {serve.cache_dtype for serve in narrow} == {"int8"}
    assert [dataclasses.replace(serve, cache_dtype="auto") for serve in narrow] == few


@pytest.mark.parametrize("part", ["largest_error", "page_size_error", "mesh_error"])
def test_numbers_that_are_too_far_are_faults(part, monkeypatch):
    compared = {"largest_error": (3, 1e-7), "page_size_error": 1e-7, "mesh_error": 1e-7}
    far = {**compared, part: (3, 1e-4) if part == "largest_error" else 1e-4}
    monkeypatch.setattr(exactness, "answer_alone", lambda *_: [])
    monkeypatch.setattr(exactness, "compare_engines", lambda *_: Count(answers=1, numbers=5))
    monkeypatch.setattr(exactness.jax, "clear_caches", lambda: None)
    for errors, faults in ((compared, 0), (far, 1)):
        for name, error in errors.items():
            monkeypatch.setattr(exactness, name, lambda *_, error=error: error)
        row, found = exactness.measure("LLaMA", "float32", 1, full=True)
        assert len(row) == len(exactness.COLUMNS)
        assert len(found) == faults
    monkeypatch.setattr(exactness, "compare_engines", lambda *_: Count())
    assert "no number was compared" in exactness.measure("LLaMA", "bfloat16", 1, full=False)[1][0]


def arguments(*argv):
    parser = argparse.ArgumentParser()
    exactness.add_arguments(parser)
    return parser.parse_args(argv)


def test_a_difference_ends_the_bench_with_an_error(tmp_path, monkeypatch, capsys):
    fault = ["GPT-2, float32: 1 of 9 differ"]

    def measure(name, dtype, requests, *, full):
        cells = [f"{name}, {dtype}", *["0"] * (len(exactness.COLUMNS) - 1)]
        return cells, fault if (name, dtype) == ("GPT-2", "float32") else []

    monkeypatch.setattr(exactness, "measure", measure)
    path = tmp_path / "exactness.json"
    exactness.main(arguments("--only=T5"))
    assert capsys.readouterr().out.count("bits that differ") == 2
    with pytest.raises(UserError, match="answers are not exact: GPT-2, float32: 1 of 9"):
        exactness.main(arguments(f"--json={path}"))
    written = json.loads(path.read_text())
    assert written["command"] == "tessera bench exactness --dtype=both --requests=48"
    assert len(written["rows"]) == 2 * len(MODELS)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--only=GPT-3", "--only = 'GPT-3' is no model of this bench"),
        ("--requests=0", "--requests = 0 must be at least 1"),
        ("--full", "--full: needs 4 devices"),
    ],
)
def test_mistakes_are_one_line(flag, said, monkeypatch):
    monkeypatch.setattr(exactness.jax, "device_count", lambda: 1)
    with pytest.raises(UserError, match=f"^{said}"):
        exactness.main(arguments(flag))

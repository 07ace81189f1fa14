"""`tessera bench engine`: its rows, the requests that arrive, and what it refuses."""

import argparse
import json

import pytest

from research.bench import engine, llama_shapes
from research.bench.engine_sides import Arrival, arrivals, memory, one_by_one, times_of
from research.bench.serving_models import write_model
from research.core.errors import UserError


def arguments(*argv):
    parser = argparse.ArgumentParser()
    engine.add_arguments(parser)
    return parser.parse_args(argv)


def test_arrivals_are_the_same_each_time_and_come_at_their_rate():
    found = arrivals(400, 2.0)
    assert found == arrivals(400, 2.0)
    assert found[0].at == 0
    assert found[-1].at == pytest.approx(200, rel=0.15)
    assert len({len(each.prompt) for each in found}) > 50


def test_times_go_from_when_a_request_came():
    asked = [Arrival(0.0, (1,), 3), Arrival(2.0, (1,), 2)]
    found = times_of(asked, lambda _: [[1.0, 1.5, 2.5], [4.0, 4.25]])
    assert found == {"first": [1.0, 2.0], "next": [0.5, 1.0, 0.25]}


def test_a_peer_answers_one_after_the_other():
    order = []

    def generate(prompt, tokens, say):
        order.append(prompt)
        for _ in range(tokens):
            say()

    asked = [Arrival(0.0, (1,), 3), Arrival(0.05, (2,), 2)]
    first, second = one_by_one(generate)(asked)
    assert order == [(1,), (2,)]
    assert (len(first), len(second)) == (3, 2)
    assert second[0] >= 0.05 > first[-1]


def test_ratios_are_how_many_times_sooner_ours_are():
    found = {"cold": [1.0, 3.0], "warm": [0.1, 0.5], "cached": [2.0] * 2, "plain": [1.0] * 2}
    shared, nothing = engine.prefix_rows(found)
    assert (shared.ratio, shared.wanted) == ("8.00 (6.00 to 10.0)", "at least 5")
    assert nothing.ratio == "0.500 (0.500 to 0.500)"
    times = {"one, plain": [2.0], "one, 3 guesses": [1.0], "one, 7 guesses": [0.5]}
    times |= {"many, plain": [1.0], "many, 3 guesses": [1.0], "many, 7 guesses": [2.0]}
    ratios = [row.ratio for row in engine.lookup_rows(times)]
    assert ratios == ["2.00", "1.00", "4.00", "0.500"]
    rows = list(engine.arrival_rows("peer", 2, 1.0, *[{"first": [1.0], "next": [0.1]}] * 2))
    assert [row.ratio for row in rows] == ["1.00 times as soon"] * 4


def test_the_parts_that_were_asked_for_have_rows(tmp_path, monkeypatch):
    found = {"compile": [0.1, 2.0, 3.0], "bytes": [100e6, 101e6]}
    monkeypatch.setattr(engine, "_measured", lambda *_: found)
    monkeypatch.setattr(engine, "write_model", lambda *_: None)
    path = tmp_path / "engine.json"
    engine.main(arguments("--only=programs,memory", f"--json={path}"))
    written = json.loads(path.read_text())
    assert written["columns"] == engine.COLUMNS
    programs, grown = written["rows"]
    assert programs[1:3] == ["3", "5.10 s"]
    assert grown[3] == "1.010"


@pytest.mark.thorough
def test_memory_is_measured_after_some_requests_and_after_many(tmp_path, monkeypatch):
    monkeypatch.setattr("research.bench.engine_sides.MEMORY_AT", (100, 300))
    write_model(tmp_path, llama_shapes.TINY, "float32")
    some, many = memory(tmp_path)["bytes"]
    assert 0 < some <= 1.05 * many


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--only=speed", "--only = 'speed' is no part"),
        ("--rate=0", "--rate = 0.0 must be above 0"),
        ("--requests=0", "--requests = 0 must be at least 1"),
    ],
)
def test_mistakes_are_one_line(flag, said):
    with pytest.raises(UserError, match=f"^{said}"):
        engine.main(arguments(flag))

"""`tessera bench parallel`: its formulas, its rows, and what it refuses."""

import argparse
import dataclasses
import json

import pytest

from research.bench import parallel, parallel_bubble, parallel_programs, report
from research.bench import parallel_formulas as formulas
from research.core.errors import UserError
from research.parallel.pipeline_schedule import make_schedule
from research.scaling.collectives import collectives

# Two layers of 6 bytes and 4 bytes of others, on 4 devices: 3 / 4 of an array is elsewhere.
DEVICES, LAYERS, OTHERS = 4, 12.0, 4.0


def arguments(*argv):
    parser = argparse.ArgumentParser()
    parallel.add_arguments(parser)
    return parser.parse_args(argv)


def test_volumes_are_those_worked_out_by_hand():
    assert formulas.data(DEVICES, 16.0) == 24.0
    # 24 of the gradients, 12 of the parameters.
    assert formulas.zero_1(DEVICES, 16.0, 16.0) == 36.0
    assert formulas.zero_2(DEVICES, 16.0, 16.0) == 24.0
    # Layers twice, others once, gradients once.
    assert formulas.zero_3(DEVICES, LAYERS, OTHERS, 16.0) == 0.75 * (24 + 4 + 16)
    # Two layers of four sums and two at the ends, of 1.5 × 8 bytes.
    assert formulas.tensor(DEVICES, 2, 8.0) == 10 * 12.0
    # 3 steps forward, 3 + 4 backward, of keys and values; four arrays there and four back.
    assert formulas.ring(DEVICES, 1, 5.0, 2.0) == 10 * 4.0 + 2 * (10.0 + 4.0)
    assert formulas.gathered_keys(DEVICES, 1, 2.0) == 2 * 12.0
    assert formulas.heads_for_tokens(DEVICES, 1, 5.0, 2.0) == 2 * 0.75 * 14.0
    assert formulas.expert(DEVICES, 2, 8.0) == 48.0
    assert formulas.pipeline(6, 1, 8.0) == 96.0


@pytest.mark.parametrize("name", parallel_bubble.CHUNKS)
def test_bubbles_are_those_of_the_schedules(name):
    chunks = parallel_bubble.CHUNKS[name]
    schedule = make_schedule(name, 4, 8, chunks)
    formula = formulas.bubble(name, 4, 8, chunks, parallel_bubble.COSTS)
    assert schedule.bubble(*parallel_bubble.COSTS) == pytest.approx(formula)


def test_a_volume_above_its_limit_says_why():
    sent = {"sent": 2.1e6, "formula": 2e6, "rest": 0.0, "small": 100.0}
    row = parallel.volume_row("fsdp, zero 3", "cpu", sent)
    assert row.measured == "2.10 MB"
    assert row.ratio == "1.050"
    assert "above" not in row.also
    row = parallel.volume_row("fsdp, zero 3", "cpu", sent | {"sent": 2.2e6, "rest": 3e6})
    assert row.ratio == "1.100"
    assert row.also.startswith("above: all-reduces")
    assert "besides: 3.00 MB" in row.also


def test_a_bubble_stands_beside_its_formula():
    measured = {
        "bubble": 0.3,
        "devices": 4,
        "microbatches": 9,
        "chunks": 1,
        "costs": [1.0, 2.0, 1.0],
    }
    row = parallel.bubble_row("1f1b", measured)
    assert (row.measured, row.formula, row.ratio) == ("0.300", "0.250", "1.200")


def test_step_times_are_compared_pair_by_pair():
    row = parallel.time_row("data", [20.0, 30.0, 60.0], [10.0, 20.0, 20.0])
    assert (row.measured, row.formula) == ("30.0 ms", "20.0 ms")
    assert row.ratio == "2.00 (1.50 to 3.00)"


def test_every_row_is_written_as_a_line_of_a_table(tmp_path, monkeypatch):
    programs = {
        "cpu": {"data": {"sent": 8.0, "formula": 8.0, "rest": 0.0, "small": 1.0}},
        "tpu": {},
    }
    programs["cpu"]["expert"] = programs["cpu"]["data"] | {"sent": 80.0}
    programs["tpu"]["expert"] = programs["cpu"]["data"]
    bubble = {"bubble": 0.3, "devices": 4, "microbatches": 9, "chunks": 1, "costs": [1.0, 2.0, 1.0]}
    asked = []

    def run(command):
        _, what, *rest = command
        asked.append((what, rest))
        found = {"1f1b": bubble}
        if what == "volumes":
            found = programs[rest[0]]
        return json.dumps(found)

    def interleave_workers(commands, rounds, count):
        return {side: [0.1] * rounds for side in commands}

    monkeypatch.setattr(parallel, "run", run)
    monkeypatch.setattr(parallel, "interleave_workers", interleave_workers)
    monkeypatch.setattr(parallel.importlib.util, "find_spec", lambda name: object())
    path = tmp_path / "out.json"
    parallel.main(arguments("--rounds=2", f"--json={path}"))
    # Only what is above its limit is compiled for TPUs.
    assert asked[1] == ("volumes", ["tpu", "expert"])
    rows = json.loads(path.read_text())["rows"]
    assert [row[0] for row in rows] == [
        "bytes sent, data, cpu",
        "bytes sent, expert, cpu",
        "bytes sent, expert, tpu",
        "bubble, 1f1b",
        "step time, data",
        "step time, fsdp, zero 3",
    ]
    assert "| bubble, 1f1b | 0.300 | 0.250 | 1.200 |" in report.table(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("flag", "said"),
    [("--only=bubbles", "--only = 'bubbles' is no part"), ("--steps=0", "--steps = 0 must be")],
)
def test_mistakes_are_one_line(flag, said):
    with pytest.raises(UserError, match=f"^{said}"):
        parallel.main(arguments(flag))


def test_the_names_are_those_of_the_programs():
    assert tuple(parallel_programs.CASES) == parallel.CASES
    assert set(parallel.TIMED) < set(parallel.CASES)
    assert {name for name, _ in parallel.REASONS} < set(parallel.CASES)


def test_a_pipeline_sends_in_each_tick_of_its_ramps():
    case = parallel_programs.CASES["pipeline, 32 microbatches"]
    # 1f1b has 39 pairs of ticks, and in 38 of either kind a device has something to send.
    assert parallel_programs.sending_share(case) == pytest.approx(38 / 78)


def small(name):
    """The case with two small layers: its compiled program's volumes, and the formula."""
    case = parallel_programs.CASES[name]
    model = dataclasses.replace(parallel_programs.MODEL, num_layers=2, max_length=32)
    program = parallel_programs.build(case, model)
    found = collectives(program.compile_train_step().as_text(), program.mesh)
    sizes = parallel_programs.sizes_of(program, model, case.microbatches)
    return parallel_programs.split_volume(found, case), case.formula(sizes)


@pytest.mark.thorough
def test_volumes_of_compiled_steps_are_those_of_the_formulas():
    volumes, formula = small("data")
    assert volumes["sent"] == pytest.approx(formula, rel=0.01)
    assert volumes["rest"] == 0
    # The control: XLA for CPU all-reduces the gradients of layers.
    volumes, formula = small("fsdp, zero 3")
    assert volumes["sent"] > 1.1 * formula

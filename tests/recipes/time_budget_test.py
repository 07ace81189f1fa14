"""`--time-budget`: the first config that ends in time, or fewer steps of the last one, and a
resumed run keeps what was chosen.
"""

import pathlib

import pytest

from research.core.errors import UserError
from research.recipes import run_cost, time_budget
from research.recipes.experiment import load_experiment
from research.recipes.run_cost import Cost, with_steps
from research.recipes.time_budget import choose
from research.recipes.workdir import read_config, write_config
from research.training.metrics import read_metrics
from tests.recipes import runs

LLAMA = runs.ROOT / "configs" / "model" / "llama.py"


@pytest.fixture
def config(tmp_path: pathlib.Path) -> pathlib.Path:
    return runs.write_config(tmp_path, runs.write_corpus(tmp_path / "corpus"))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds are gone; measuring takes none."""
    monkeypatch.setattr(time_budget, "elapsed", lambda: 10.0)


def costs(monkeypatch: pytest.MonkeyPatch, **steps: float) -> list[str]:
    """Has a config cost so many seconds a step, by its width; returns the widths that are timed."""
    timed = []

    def measure(config) -> Cost:
        width = f"w{config.model.embed_dim}"
        timed.append(width)
        return Cost(parameters=1, start=5.0, step=steps[width], evaluation=2.0)

    monkeypatch.setattr(time_budget, "measure", measure)
    return timed


def test_what_is_counted_in_steps_shrinks_with_them(config: pathlib.Path):
    whole = load_experiment(
        str(config),
        [
            ("train.steps", "100"),
            ("train.eval_every", "50"),
            ("optim.schedule.name", "wsd"),
            ("optim.schedule.warmup_steps", "10"),
            ("optim.schedule.decay_steps", "40"),
            ("checkpoint.every", "20"),
            ("checkpoint.keep_every", "40"),
        ],
    )
    half = with_steps(whole, 50)
    assert (half.train.steps, half.train.eval_every) == (50, 25)
    assert (half.optim.schedule.warmup_steps, half.optim.schedule.decay_steps) == (5, 20)
    assert (half.checkpoint.every, half.checkpoint.keep_every) == (10, 20)
    one = with_steps(whole, 1)
    assert (one.optim.schedule.warmup_steps, one.optim.schedule.decay_steps) == (0, 1)
    assert with_steps(whole, 100) == whole


def test_a_run_costs_its_steps_and_evaluations_with_a_margin(config: pathlib.Path):
    # 12 steps, evaluated after 4, 8 and 12.
    cost = Cost(parameters=1, start=5.0, step=0.5, evaluation=2.0)
    assert cost.seconds(load_experiment(str(config), [])) == pytest.approx(
        5 + run_cost.MARGIN * (12 * 0.5 + 3 * 2)
    )


def widths(config: pathlib.Path, *narrower: int) -> list[str]:
    """Returns the config's file, and files of the same with other widths."""
    specs = [str(config)]
    for width in narrower:
        path = config.with_name(f"w{width}.py")
        path.write_text(config.read_text().replace('"embed_dim": 16', f'"embed_dim": {width}'))
        specs.append(str(path))
    return specs


def test_the_first_config_that_ends_in_time_is_taken(
    config: pathlib.Path, clock: None, monkeypatch: pytest.MonkeyPatch, caplog
):
    specs = widths(config, 8, 4)
    timed = costs(monkeypatch, w16=10.0, w8=1.0, w4=0.5)
    with caplog.at_level("INFO", "tessera"):
        chosen = choose(specs, [], 60.0, config.parent / "run")
    assert (chosen.model.embed_dim, chosen.train.steps) == (8, 12)
    assert timed == ["w4", "w8", "w16"], "from the cheapest one upwards"
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == "time budget: 60 s, of which 10 s are spent"
    assert [("chosen" in line, "estimated" in line) for line in said[2:]] == [
        (False, False),
        (True, False),
        (False, False),
    ]

    timed = costs(monkeypatch, w16=0.3, w8=0.2, w4=0.1)
    assert choose(specs, [], 60.0, config.parent / "run").model.embed_dim == 16


@pytest.mark.parametrize(
    ("seconds", "taken", "wanted"),
    [
        # 12 steps and 3 evaluations of 2 s take 48.6 of the 50 s that are left; those of twice the
        # width take nearly twice as long, above 1.5 · 50.
        ({"w4": 1.0, "w8": 2.8}, 8, ["w4", "w8"]),
        ({"w4": 2.8}, 4, ["w4"]),
        ({"w4": 10.0}, 4, ["w4"]),
    ],
)
def test_a_config_that_cannot_end_in_time_by_its_flops_is_not_timed(
    config: pathlib.Path,
    clock: None,
    seconds: dict[str, float],
    taken: int,
    wanted: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog,
):
    timed = costs(monkeypatch, **seconds)
    with caplog.at_level("INFO", "tessera"):
        chosen = choose(widths(config, 8, 4), [], 60.0, config.parent / "run")
    assert chosen.model.embed_dim == taken
    assert timed == wanted
    rows = [record.getMessage() for record in caplog.records][2:]
    assert sum("estimated by FLOPs" in row for row in rows) == 3 - len(wanted)


def test_the_last_config_gets_as_many_steps_as_end_in_time(
    config: pathlib.Path, clock: None, monkeypatch: pytest.MonkeyPatch
):
    costs(monkeypatch, w16=10.0)
    chosen = choose([str(config)], [], 60.0, config.parent / "run")
    # 10 s are gone and 5 s compile; 1.1 · (n · 10 + evaluations · 2) must be at most 45. The
    # evaluations shrink too: every step of 3 has one.
    assert chosen.train.steps == 3
    cost = Cost(parameters=1, start=5.0, step=10.0, evaluation=2.0)
    assert 10 + cost.seconds(chosen) <= 60 < 10 + cost.seconds(with_steps(chosen, 4))


def test_a_budget_too_small_for_one_step_says_so(
    config: pathlib.Path, clock: None, monkeypatch: pytest.MonkeyPatch
):
    costs(monkeypatch, w16=10.0)
    with pytest.raises(UserError) as caught:
        choose([str(config)], [], 20.0, config.parent / "run")
    assert str(caught.value) == (
        "time_budget = 20.0 is too small for one step: what comes before it took 10 s, and "
        "compiling, a step and an evaluation take 18 s. Give at least 29."
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--time-budget=0"], "--time-budget = 0.0 must be above 0 seconds."),
        (["--time-budget=nan"], "--time-budget = nan must be above 0 seconds."),
        (["--time-budget=inf"], "--time-budget = inf must be finite."),
        (["--time-budget=soon"], "--time-budget: invalid float value: 'soon'"),
        (["--time-budget=0.5"], "is too small for one step"),
        (["--fallback=other.py"], "--fallback needs --time-budget"),
        (["--time-budget=9", "--fallback=no.py"], "--fallback = 'no.py' is not a file."),
        (
            ["--time-budget=9", f"--fallback={LLAMA}:99b"],
            f"--fallback = '{LLAMA}:99b': size = '99b' is not a LLaMA. ",
        ),
        (
            ["--time-budget=9", "--config.distributed.initialize=True"],
            "--time-budget is for one process, not for several.",
        ),
    ],
)
def test_bad_budgets_are_one_line(
    config: pathlib.Path, flags: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert runs.command("train", config, config.parent / "run", *flags) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (config.parent / "run" / "config.json").exists()


def test_a_run_within_a_budget_trains_and_is_resumed_as_it_was_chosen(
    config: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    workdir = config.parent / "run"
    monkeypatch.setattr(time_budget, "elapsed", lambda: 0.0)
    assert runs.command("train", config, workdir, "--time-budget=1000") == 0
    assert read_metrics(workdir)[-1]["step"] == 12
    stored = read_config(workdir)

    costs(monkeypatch)  # nothing may be timed
    assert runs.command("train", config, workdir, "--time-budget=3") == 0
    assert read_config(workdir) == stored
    other = config.with_name("other.py")
    other.write_text(config.read_text().replace("0.01", "0.02"))
    costs(monkeypatch, w16=0.1)
    assert runs.command("train", other, workdir, "--time-budget=1000") == 2


@pytest.mark.parametrize(("steps", "said"), [(1, "1 step;"), (2, "2 steps;")])
def test_a_workdir_that_keeps_its_steps_says_how_to_start_anew(
    config: pathlib.Path, steps: int, said: str, monkeypatch: pytest.MonkeyPatch, caplog
):
    workdir = config.parent / "run"
    workdir.mkdir()
    write_config(workdir, with_steps(load_experiment(str(config), []), steps))
    costs(monkeypatch)  # nothing may be timed
    with caplog.at_level("INFO", "tessera"):
        assert choose([str(config)], [], 60.0, workdir).train.steps == steps
    [line] = caplog.messages
    assert line == (
        f"time budget: {workdir} keeps its {said} to start anew, delete it, or give another "
        "--workdir"
    )

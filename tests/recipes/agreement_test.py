"""Processes of a run that were started with different configs refuse before the first step."""

import pathlib
import socket

import jax
import pytest

from research.core.errors import UserError
from research.recipes import agreement
from research.recipes.experiment import ExperimentConfig, load_experiment
from tests.recipes import runs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [{"train.seed": 0}, {"train.seed": 0}, {"train.seed": 1}],
            "train.seed = 1 on process 2, but 0 on process 0.",
        ),
        # A field that only one version has.
        (
            [{"a": 0, "new": 1}, {"a": 0}],
            "new = 'not set' on process 1, but 1 on process 0.",
        ),
        ([{"a": 0}, {"a": 0, "new": 1}], "new = 1 on process 1, but not set on process 0."),
        # The first of several that differ: what comes first may be why.
        (
            [{"version of jax": "1", "a": 0}, {"version of jax": "2", "a": 1}],
            "version of jax = '2' on process 1, but 1 on process 0.",
        ),
    ],
)
def test_the_first_process_and_key_that_differ_are_named(values, message: str):
    with pytest.raises(UserError) as caught:
        agreement.check_equal(values)
    assert str(caught.value).startswith(message)


def test_equal_values_are_not_refused():
    agreement.check_equal([{"a": 0, "b": None}] * 3)


def started(config: pathlib.Path, *changes: tuple[str, str]) -> dict[str, object]:
    return agreement.started_with(load_experiment(str(config), changes), pathlib.Path("runs/a"))


def test_every_field_is_compared_but_for_those_that_tell_processes_apart(tiny: pathlib.Path):
    values = started(tiny)
    assert values["data.sources.0.heldout_fraction"] == 0.2
    assert values["version of jax"] == jax.__version__
    assert values["workdir"] == "runs/a"
    # Every change is seen, inside lists and groups too.
    for name, value in (
        ("data.sources.0.weight", "2.0"),
        ("mesh.tensor", "2"),
        ("model.position.theta", "500.0"),
        ("optim.clip_norm", "none"),
    ):
        with pytest.raises(UserError, match=f"^{name} = "):
            agreement.check_equal([values, started(tiny, (name, value))])

    here = {"initialize": "True", "coordinator": "a:1", "num_processes": "2", "process_id": "1"}
    changes = [(f"distributed.{name}", value) for name, value in here.items()]
    agreement.check_equal([values, started(tiny, *changes)])
    groups = {name.partition(".")[0] for name in values}
    assert set(ExperimentConfig.__dataclass_fields__) - groups == {"distributed"}


@pytest.mark.processes
def test_both_processes_say_in_one_line_which_value_differs(tiny: pathlib.Path, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    workdir = tmp_path / "run"
    processes = []
    for index, rate in enumerate(("0.01", "0.02")):
        changes = {
            "distributed.initialize": True,
            "distributed.coordinator": f"localhost:{port}",
            "distributed.num_processes": 2,
            "distributed.process_id": index,
            "optim.learning_rate": rate,
        }
        flags = [f"--config={tiny}", f"--workdir={workdir}", *runs.flags(changes)]
        processes.append(runs.spawn("train", *flags, devices=1))
    said = [process.communicate(timeout=200) for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    line = (
        "optim.learning_rate = 0.02 on process 1, but 0.01 on process 0. Start all processes with "
        "the same config and code."
    )
    for _, errors in said:
        (found,) = errors.splitlines()
        assert found.endswith(line)
    assert not workdir.exists()


def test_the_digest_of_the_package_follows_from_its_files(
    tiny: pathlib.Path, tmp_path, monkeypatch
):
    config = load_experiment(str(tiny), [])
    (tmp_path / "__init__.py").write_text("")
    monkeypatch.setattr(agreement.research, "__file__", str(tmp_path / "__init__.py"))

    def digest() -> str:
        return agreement.started_with(config, tmp_path)["digest of the package"]

    empty = digest()
    (tmp_path / "a.py").write_text("x = 1")
    one = digest()
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    renamed = digest()
    (tmp_path / "b.py").write_text("x = 2")
    assert len({empty, one, renamed, digest()}) == 4

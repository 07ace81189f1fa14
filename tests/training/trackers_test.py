"""Trackers get the numbers of a run through their own packages, offline; what fails is one line."""

import json
import logging
import pathlib
import sqlite3
import sys
import types
from collections.abc import Mapping

import pytest

from research.core.errors import UserError
from research.training.trackers import TRACKERS, TrackerConfig, TrackersConfig, open_trackers

TRACKIO = TrackersConfig(trackio=TrackerConfig())
VALUES = {"model": {"num_layers": 2}, "train": {"steps": 10}}


class Package(types.ModuleType):
    """A package of a tracker that keeps what it gets."""

    def __init__(self):
        super().__init__("trackio")
        self.runs: dict[str, list[tuple[int, Mapping[str, float]]]] = {}

    def init(self, name: str, **options: object) -> "Package":
        self.current = self.runs.setdefault(name, [])
        return self

    def log(self, values: Mapping[str, float], step: int) -> None:
        if "train/broken" in values:
            raise ConnectionError("the service is gone\nand a long trace")
        self.current.append((step, values))

    def finish(self) -> None:
        self.current.append((-1, {}))


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    package = Package()
    monkeypatch.setitem(sys.modules, "trackio", package)
    return package


def test_a_resumed_run_is_the_same_one_at_the_tracker(tmp_path: pathlib.Path, package: Package):
    for step in (1, 2):
        (tracker,) = open_trackers(TRACKIO, tmp_path / "run", VALUES)
        tracker.write(step, {"train/loss": step / 4})
        tracker.close()
    ((name, rows),) = package.runs.items()
    assert name.startswith("run-")
    assert rows == [(1, {"train/loss": 0.25}), (-1, {}), (2, {"train/loss": 0.5}), (-1, {})]

    (tracker,) = open_trackers(TRACKIO, tmp_path / "other", VALUES)
    assert len(package.runs) == 2, "another workdir is another run"


def test_a_fault_in_the_middle_is_one_warning(
    tmp_path: pathlib.Path, package: Package, caplog: pytest.LogCaptureFixture
):
    (tracker,) = open_trackers(TRACKIO, tmp_path, VALUES)
    with caplog.at_level(logging.WARNING, "tessera"):
        for _ in range(3):
            tracker.write(1, {"train/broken": 1.0})
        tracker.write(2, {"train/loss": 1.0})
        tracker.close()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["trackio gets no more numbers: the service is gone"]
    assert list(package.runs.values()) == [[]]


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "trackio"])
def test_a_tracker_without_its_package_is_one_line(
    kind: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(UserError) as caught:
        open_trackers(TrackersConfig(**{kind: TrackerConfig()}), tmp_path, VALUES)
    assert str(caught.value) == (
        f"trackers.{kind} needs a package: pip install -e '.[{kind}]', or set "
        f"trackers.{kind}.optional = True."
    )
    optional = TrackersConfig(**{kind: TrackerConfig(optional=True)})
    with caplog.at_level(logging.WARNING, "tessera"):
        assert open_trackers(optional, tmp_path, VALUES) == []
    assert caplog.records[-1].getMessage().endswith("The run goes on without it.")


def test_a_tracker_that_cannot_start_closes_those_before_it(
    tmp_path: pathlib.Path, package: Package, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "mlflow", package)
    monkeypatch.setitem(TRACKERS, "mlflow", TRACKERS["trackio"])
    monkeypatch.setitem(sys.modules, "trackio", None)
    both = TrackersConfig(mlflow=TrackerConfig(), trackio=TrackerConfig())
    with pytest.raises(UserError, match=r"^trackers\.trackio needs a package"):
        open_trackers(both, tmp_path, VALUES)
    assert list(package.runs.values()) == [[(-1, {})]]


@pytest.fixture
def alone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder without anybody's credentials and settings."""
    for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
        (tmp_path / name.lower()).mkdir()
    for name in ("WANDB_API_KEY", "WANDB_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it reads the environment once a process
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_twice(kind: str, workdir: pathlib.Path) -> None:
    """Writes two steps of a run, the second after a resume."""
    trackers = TrackersConfig(**{kind: TrackerConfig("tiles")})
    for step in (1, 2):
        (tracker,) = open_trackers(trackers, workdir, VALUES)
        tracker.write(step, {"train/loss": step / 4})
        tracker.close()


@pytest.mark.live
def test_wandb_gets_the_numbers_offline(alone: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_twice("wandb", alone / "run")
    wandb.teardown()  # as at the end of a process: its service writes in the background
    files = sorted((alone / "wandb_dir").rglob("*.wandb"))
    assert len(files) == 2, "a file a start"
    assert len({file.name for file in files}) == 1, "of one run"
    for file, value in zip(files, ("0.25", "0.5"), strict=True):
        data = file.read_bytes()
        assert b"train/loss" in data
        assert value.encode() in data


@pytest.mark.live
def test_wandb_without_credentials_is_one_line(alone: pathlib.Path):
    pytest.importorskip("wandb")
    with pytest.raises(UserError) as caught:
        open_trackers(TrackersConfig(wandb=TrackerConfig()), alone / "run", VALUES)
    assert str(caught.value) == (
        "trackers.wandb cannot be started: no API key: run `wandb login`, or set "
        "WANDB_MODE=offline."
    )


@pytest.mark.live
def test_mlflow_gets_the_numbers_offline(alone: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (alone / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run_twice("mlflow", alone / "run")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("tiles")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.data.params == {"model.num_layers": "2", "train.steps": "10"}
    rows = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(row.step, row.value) for row in rows] == [(1, 0.25), (2, 0.5)]


@pytest.mark.live
def test_trackio_gets_the_numbers_offline(alone: pathlib.Path):
    pytest.importorskip("trackio")
    run_twice("trackio", alone / "run")
    with sqlite3.connect(alone / "trackio_dir" / "tiles.db") as table:
        rows = table.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    assert [(step, json.loads(metrics)) for _, step, metrics in rows] == [
        (1, {"train/loss": 0.25}),
        (2, {"train/loss": 0.5}),
    ]

"""Trackers get the numbers of a run through their own packages, offline; what fails is one line."""

import json
import logging
import pathlib
import sqlite3
import sys
import time
import types
from collections.abc import Mapping

import pytest

from research.core.errors import UserError
from research.training.metrics import read_metrics
from research.training.program import Program
from research.training.trackers import (
    ADVICE,
    TRACKERS,
    TrackerConfig,
    TrackersConfig,
    open_trackers,
)
from tests.recipes import runs

TRACKIO = TrackersConfig(trackio=TrackerConfig())
STEPS = (41, 83)
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
        with open_trackers(TRACKIO, tmp_path / "run", VALUES) as (tracker,):
            tracker.write(step, {"train/loss": step / 4})
    ((name, rows),) = package.runs.items()
    assert name.startswith("run-")
    assert rows == [(1, {"train/loss": 0.25}), (-1, {}), (2, {"train/loss": 0.5}), (-1, {})]

    with open_trackers(TRACKIO, tmp_path / "other", VALUES):
        assert len(package.runs) == 2, "another workdir is another run"


def test_a_fault_in_the_middle_is_one_warning(
    tmp_path: pathlib.Path, package: Package, caplog: pytest.LogCaptureFixture
):
    with (
        caplog.at_level(logging.WARNING, "tessera"),
        open_trackers(TRACKIO, tmp_path, VALUES) as (tracker,),
    ):
        for _ in range(3):
            tracker.write(1, {"train/broken": 1.0})
        tracker.write(2, {"train/loss": 1.0})
    said = [record.getMessage() for record in caplog.records]
    assert said == ["trackio gets no more numbers: the service is gone"]
    assert list(package.runs.values()) == [[]]


def start(trackers: TrackersConfig, workdir: pathlib.Path) -> int:
    """Opens trackers, closes them and returns how many there were."""
    with open_trackers(trackers, workdir, VALUES) as opened:
        return len(opened)


@pytest.mark.parametrize("text", ['{"trackio": "1f', "[]"])
def test_damaged_ids_are_one_line(
    text: str, tmp_path: pathlib.Path, package: Package, caplog: pytest.LogCaptureFixture
):
    path = tmp_path / "trackers.json"
    path.write_text(text)
    with pytest.raises(UserError) as caught:
        start(TRACKIO, tmp_path)
    assert str(caught.value).startswith(str(path))
    with caplog.at_level(logging.WARNING, "tessera"):
        assert start(TrackersConfig(trackio=TrackerConfig(optional=True)), tmp_path) == 0
    assert caplog.records[-1].getMessage().endswith("The run goes on without it.")
    assert path.read_text() == text
    assert package.runs == {}


def test_what_fails_after_the_start_closes_the_tracker(tmp_path: pathlib.Path, package: Package):
    with pytest.raises(RuntimeError), open_trackers(TRACKIO, tmp_path, VALUES):
        raise RuntimeError("the step does not compile")
    assert list(package.runs.values()) == [[(-1, {})]]


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "trackio"])
def test_a_tracker_without_its_package_is_one_line(
    kind: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    monkeypatch.setitem(sys.modules, kind, None)
    with pytest.raises(UserError) as caught:
        start(TrackersConfig(**{kind: TrackerConfig()}), tmp_path)
    assert str(caught.value) == (
        f"trackers.{kind} needs a package: pip install -e '.[{kind}]', or set "
        f"trackers.{kind}.optional = True."
    )
    optional = TrackersConfig(**{kind: TrackerConfig(optional=True)})
    with caplog.at_level(logging.WARNING, "tessera"):
        assert start(optional, tmp_path) == 0
    assert caplog.records[-1].getMessage().endswith("The run goes on without it.")


def test_a_tracker_that_cannot_start_closes_those_before_it(
    tmp_path: pathlib.Path, package: Package, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "mlflow", package)
    monkeypatch.setitem(TRACKERS, "mlflow", TRACKERS["trackio"])
    monkeypatch.setitem(sys.modules, "trackio", None)
    both = TrackersConfig(mlflow=TrackerConfig(), trackio=TrackerConfig())
    with pytest.raises(UserError, match=r"^trackers\.trackio needs a package"):
        start(both, tmp_path)
    assert list(package.runs.values()) == [[(-1, {})]]


def test_a_run_sends_the_rows_of_its_metrics(tmp_path: pathlib.Path, package: Package):
    config = runs.write_config(tmp_path, runs.write_corpus(tmp_path / "corpus"))
    runs.run(config, tmp_path / "run", trackers__trackio__project="tiles")
    rows = []
    for row in read_metrics(tmp_path / "run"):
        known = {name: value for name, value in row.items() if value is not None}
        rows.append((known.pop("step"), known))
    assert rows[-1][0] == runs.STEPS
    assert list(package.runs.values()) == [[*rows, (-1, {})]]


def test_trackers_start_before_anything_is_compiled(
    tmp_path: pathlib.Path, package: Package, monkeypatch: pytest.MonkeyPatch
):
    def fail(program: Program) -> None:
        raise RuntimeError("the step does not compile")

    monkeypatch.setattr(Program, "compile_train_step", fail)
    config = runs.write_config(tmp_path, runs.write_corpus(tmp_path / "corpus"))
    with pytest.raises(RuntimeError):
        runs.run(config, tmp_path / "run", trackers__trackio__project="tiles")
    assert list(package.runs.values()) == [[(-1, {})]]

    monkeypatch.setitem(sys.modules, "trackio", None)
    with pytest.raises(UserError, match=r"^trackers\.trackio needs a package"):
        runs.run(config, tmp_path / "run", trackers__trackio__project="tiles")


@pytest.mark.parametrize("existed", [False, True])
def test_a_run_that_its_tracker_refuses_leaves_the_workdir_as_it_was(
    existed: bool, tmp_path: pathlib.Path, package: Package, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "mlflow", package)
    monkeypatch.setitem(TRACKERS, "mlflow", TRACKERS["trackio"])
    monkeypatch.setitem(sys.modules, "trackio", None)
    config = runs.write_config(tmp_path, runs.write_corpus(tmp_path / "corpus"))
    workdir = tmp_path / "run"
    if existed:
        workdir.mkdir()
        (workdir / "notes").write_text("mine")
    both = {"trackers__mlflow__project": "tiles", "trackers__trackio__project": "tiles"}
    with pytest.raises(UserError, match=r"^trackers\.trackio needs a package"):
        runs.run(config, workdir, **both)
    if existed:
        assert {path.name for path in workdir.iterdir()} == {"notes", ".lock"}
    else:
        assert not workdir.exists()

    # The next command may have another config.
    runs.run(config, workdir, train__steps=3, optim__learning_rate=0.02)
    assert read_metrics(workdir)[-1]["step"] == 3
    assert not (workdir / "trackers.json").exists()


class Unreachable:
    """An MLflow without a server: urllib3 says each attempt, and the error has a long line."""

    class entities:
        Metric = None

    class MlflowClient:
        def get_experiment_by_name(self, name: str) -> None:
            logging.getLogger("urllib3.connectionpool").warning("Retrying (Retry(total=1 …")
            raise ConnectionError(f"HTTPConnectionPool: {1000 * 'x'}\nand a long trace")


@pytest.mark.parametrize("uri", [None, "http://127.0.0.1:9"])
def test_a_server_that_does_not_answer_is_one_short_line(
    uri: str | None,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
):
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")  # what the tracker sets is forgotten after the test
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if uri is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setitem(sys.modules, "mlflow", Unreachable)
    with pytest.raises(UserError) as caught:
        start(TrackersConfig(mlflow=TrackerConfig()), tmp_path / "run")
    reason = f"HTTPConnectionPool: {180 * 'x'}…."
    # Without an address the advice comes first.
    if uri is None:
        wanted = f"cannot be started. {ADVICE['mlflow']} It says: {reason}"
    else:
        wanted = f"cannot be started: {reason} {ADVICE['mlflow']}"
    assert str(caught.value) == f"trackers.mlflow {wanted}"
    assert caplog.messages == []
    assert not (tmp_path / "run").exists()

    logging.getLogger("urllib3.connectionpool").warning("said by others")
    assert caplog.messages == ["said by others"], "the logger is silent for this alone"


@pytest.fixture
def alone(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A folder without anybody's credentials and settings."""
    for name in ("HOME", "WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "TRACKIO_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
        (tmp_path / name.lower()).mkdir()
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "MLFLOW_TRACKING_URI",
        "MLFLOW_ALLOW_FILE_STORE",
    ):
        monkeypatch.delenv(name, raising=False)
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()  # it reads the environment once a process
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_twice(kind: str, workdir: pathlib.Path) -> None:
    """Writes two steps of a run, the second after a resume.

    A tracker that counts rows itself has other steps.
    """
    trackers = TrackersConfig(**{kind: TrackerConfig("tiles")})
    for step in STEPS:
        with open_trackers(trackers, workdir, VALUES) as (tracker,):
            tracker.write(step, {"train/loss": step / 4})


@pytest.mark.live
def test_wandb_gets_the_numbers_offline(alone: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run_twice("wandb", alone / "run")
    wandb.teardown()  # as at the end of a process: its service writes in the background
    files = sorted((alone / "wandb_dir").rglob("*.wandb"))
    assert len(files) == 2, "a file a start"
    assert len({file.name for file in files}) == 1, "of one run"
    data = [file.read_bytes() for file in files]
    # Items of its protobuf: the name, then field 16 with its length and the value in JSON.
    for run, step, loss in zip(data, (b"41", b"83"), (b"10.25", b"20.75"), strict=True):
        assert b"_step\x82\x01\x02" + step in run
        assert b"train/loss\x82\x01\x05" + loss in run


@pytest.mark.live
def test_wandb_without_credentials_is_one_line(alone: pathlib.Path):
    pytest.importorskip("wandb")
    with pytest.raises(UserError) as caught:
        start(TrackersConfig(wandb=TrackerConfig()), alone / "run")
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
    assert [(row.step, row.value) for row in rows] == [(41, 10.25), (83, 20.75)]


@pytest.mark.live
@pytest.mark.parametrize(
    "uri", [None, "sqlite:///mlflow.db", "file:///mlruns", "http://127.0.0.1:9"]
)
def test_mlflow_that_cannot_start_is_one_line_with_advice(
    uri: str | None, alone: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("mlflow")
    if uri is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        start(TrackersConfig(mlflow=TrackerConfig()), alone / "run")
    assert time.monotonic() - began < 60
    (line,) = str(caught.value).splitlines()
    # Without an address the advice comes first.
    if uri is None:
        assert line.startswith(f"trackers.mlflow cannot be started. {ADVICE['mlflow']} It says: ")
        return
    assert line.startswith("trackers.mlflow cannot be started: ")
    assert line.endswith(ADVICE["mlflow"])


@pytest.mark.live
def test_trackio_gets_the_numbers_offline(alone: pathlib.Path):
    pytest.importorskip("trackio")
    run_twice("trackio", alone / "run")
    with sqlite3.connect(alone / "trackio_dir" / "tiles.db") as table:
        rows = table.execute("select run_name, step, metrics from metrics order by step").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    assert [(step, json.loads(metrics)) for _, step, metrics in rows] == [
        (41, {"train/loss": 10.25}),
        (83, {"train/loss": 20.75}),
    ]

"""Experiment trackers by config: Weights & Biases, MLflow, Trackio, through their own packages.

`metrics.jsonl` has every number; a tracker gets them too. It is addressed as its package says:
`WANDB_API_KEY`, `WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`, `TRACKIO_DIR` and so on.
"""

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import secrets
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, Protocol

import jax

from research.core.errors import UserError, join
from research.storage import files
from research.storage.json_files import read_object
from research.storage.paths import Path

logger = logging.getLogger("tessera")

# In the workdir: the id of the run at each tracker, so that a resumed run is the same one there.
FILE = "trackers.json"

# What a tracker that cannot be started needs, where its own error does not say it.
ADVICE = {
    "mlflow": "Set MLFLOW_TRACKING_URI to the address of a server, or to file:///… together with "
    "MLFLOW_ALLOW_FILE_STORE=true."
}
# Where its package finds the address of its server.
ADDRESSES = {"mlflow": "MLFLOW_TRACKING_URI"}
# Characters of a tracker's own error that are shown.
LONGEST_REASON = 200


@dataclasses.dataclass(frozen=True)
class TrackerConfig:
    """A service that gets the numbers of a run.

    Attributes:
      project: project of the run; for MLflow its experiment.
      name: of the run; empty: that of the workdir's folder.
      optional: whether the run goes on without a tracker that cannot be started.
    """

    project: str = "tessera"
    name: str = ""
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class TrackersConfig:
    """The trackers of a run; None: not this one.

    Attributes:
      wandb: Weights & Biases.
      mlflow: MLflow.
      trackio: Trackio.
    """

    wandb: TrackerConfig | None = None
    mlflow: TrackerConfig | None = None
    trackio: TrackerConfig | None = None

    def wanted(self) -> dict[str, TrackerConfig]:
        """Returns the trackers that are not None, by the name of their package."""
        trackers = {"wandb": self.wandb, "mlflow": self.mlflow, "trackio": self.trackio}
        return {name: config for name, config in trackers.items() if config is not None}


@typing.runtime_checkable
class Tracker(Protocol):
    """A run at a service."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the numbers of a step."""

    def close(self) -> None:
        """Sends what is not sent yet."""


class _WeightsAndBiases:
    def __init__(self, package: Any, config: TrackerConfig, run_id: str, values: dict[str, Any]):
        if package.setup().settings.mode == "online" and not package.login(prompt=False):
            raise PermissionError("no API key: run `wandb login`, or set WANDB_MODE=offline")
        self._run = package.init(
            project=config.project,
            name=config.name,
            id=run_id,
            resume="allow",
            config=values,
            settings=package.Settings(console="off", silent=True),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, package: Any, config: TrackerConfig, run_id: str, values: dict[str, Any]):
        # Its own defaults, 7 retries and 120 s, hold a run up for minutes where the server is down.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")

        self._metric = package.entities.Metric
        self._client = package.MlflowClient()
        experiment = self._client.get_experiment_by_name(config.project)
        if experiment is None:
            experiment_id = self._client.create_experiment(config.project)
        else:
            experiment_id = experiment.experiment_id

        # MLflow makes ids of its own, so ours is a tag that is searched for.
        found = self._client.search_runs([experiment_id], f"tags.tessera_id = '{run_id}'")
        if found:
            self._id = found[0].info.run_id
        else:
            tags = {"tessera_id": run_id}
            self._id = self._client.create_run(
                experiment_id, tags=tags, run_name=config.name
            ).info.run_id
            for name, value in _flat(values).items():
                self._client.log_param(self._id, name, value)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        now = int(1000 * time.time())
        metrics = [self._metric(name, value, now, step) for name, value in values.items()]
        # MLflow's asynchronous logging keeps every row that a dead server does not take, logs an
        # error for each, and raises none.
        self._client.log_batch(self._id, metrics=metrics, synchronous=True)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _Trackio:
    def __init__(self, package: Any, config: TrackerConfig, run_id: str, values: dict[str, Any]):
        # Its runs are resumed by name.
        self._run = package.init(
            project=config.project,
            name=f"{config.name}-{run_id}",
            resume="allow",
            config=values,
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[ModuleType, TrackerConfig, str, dict[str, Any]], Tracker]] = {
    "wandb": _WeightsAndBiases,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}


class _Safe:
    """A tracker whose faults in the middle of a run are a warning: the run goes on without it."""

    def __init__(self, name: str, tracker: Tracker):
        self._name = name
        self._tracker: Tracker | None = tracker

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._attempt(lambda tracker: tracker.write(step, values))

    def close(self) -> None:
        self._attempt(lambda tracker: tracker.close())

    def _attempt(self, act: Callable[[Tracker], None]) -> None:
        if self._tracker is None:
            return
        try:
            with _quiet():
                act(self._tracker)
        except Exception as error:
            logger.warning("%s gets no more numbers: %s", self._name, _first_line(error))
            self._tracker = None


@contextlib.contextmanager
def open_trackers(
    configs: TrackersConfig, workdir: Path, values: dict[str, Any]
) -> Iterator[list[Tracker]]:
    """Starts or resumes the run at each tracker, and closes them at the end; on processes other
    than the first there are none.

    Args:
      configs: of the trackers.
      workdir: of the run, which keeps the ids of the run at the trackers.
      values: the plain config of the run, which trackers show.

    Raises:
      UserError: a tracker that is not optional has no package, no credentials, no answer or no
          readable id in the workdir; nothing is written there.
    """
    wanted = configs.wanted() if jax.process_index() == 0 else {}
    # Where one cannot be started, those before it are closed: they must not show a running run.
    with contextlib.ExitStack() as stack:
        opened: list[Tracker] = []
        ids: dict[str, str] = {}
        for package_name, config in wanted.items():
            named = dataclasses.replace(config, name=config.name or workdir.name)
            try:
                run_id = _run_id(workdir, package_name)
                tracker = _Safe(package_name, _open(package_name, named, run_id, values))
            except UserError as error:
                if not config.optional:
                    raise
                logger.warning("%s The run goes on without it.", error)
                continue
            stack.callback(tracker.close)
            opened.append(tracker)
            ids[package_name] = run_id
        _keep_ids(workdir, ids)
        yield opened


def _open(package_name: str, config: TrackerConfig, run_id: str, values: dict[str, Any]) -> Tracker:
    field = f"trackers.{package_name}"
    try:
        package = importlib.import_module(package_name)
    except ImportError as error:
        raise UserError(
            field,
            constraint=f"needs a package: pip install -e '.[{package_name}]', or set "
            f"{field}.optional = True.",
        ) from error
    try:
        with _quiet():
            return TRACKERS[package_name](package, config, run_id, values)
    except Exception as error:
        raise UserError(field, constraint=_cannot_be_started(package_name, error)) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides what packages print: addresses and thanks, and a line for each attempt to reach a
    server, whose last error is raised as well.
    """
    attempts = logging.getLogger("urllib3")
    level = attempts.level
    attempts.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        attempts.setLevel(level)


def _cannot_be_started(package_name: str, error: Exception) -> str:
    """Returns what a tracker's own error says, with advice where it has none."""
    reason = _first_line(error)
    if package_name not in ADVICE:
        return f"cannot be started: {reason}."
    advice = ADVICE[package_name]
    # Without an address the error is about a default that nobody asked for.
    if ADDRESSES[package_name] not in os.environ:
        return f"cannot be started. {advice} It says: {reason}."
    return f"cannot be started: {reason}. {advice}"


def _run_id(workdir: Path, package_name: str) -> str:
    """Returns the id of the workdir's run at a tracker, or a new one."""
    path = workdir / FILE
    # {"wandb": "1f0a99c3", "mlflow": "5be07d12"}
    ids = read_object(path) if path.exists() else {}
    if package_name in ids:
        return ids[package_name]
    return secrets.token_hex(4)


def _keep_ids(workdir: Path, ids: dict[str, str]) -> None:
    """Adds ids of the workdir's run to those that it keeps."""
    path = workdir / FILE
    if not ids:
        return
    kept = read_object(path) if path.exists() else {}
    if kept != kept | ids:
        files.make_folder(workdir)
        files.write_text(path, json.dumps(kept | ids) + "\n")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    line = lines[0].rstrip(".")
    if len(line) <= LONGEST_REASON:
        return line
    return f"{line[:LONGEST_REASON]}…"


def _flat(values: Any, name: str = "") -> dict[str, Any]:
    """Returns nested dicts as one, with dotted names."""
    if not isinstance(values, dict):
        return {name: values}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, join(name, key))
    return flat

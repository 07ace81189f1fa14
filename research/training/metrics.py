"""The metrics of a run: rows of `metrics.jsonl`, the same for TensorBoard, and the log line.

A row is `{"step": …, "train/loss": …}`. `train/loss`, which is logged too, is the mean since the
row before (loss_mean.py); `train/step_loss` is the loss of the row's step alone.

JSON has no numbers that are not finite, so these are written as the strings "NaN", "Infinity" and
"-Infinity", which Python's `float()` and JavaScript's `Number()` read back; null is an unknown
number (the utilization of a device whose peak is unknown).
"""

import contextlib
import datetime
import json
import logging
import math
import numbers
import pathlib
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import psutil

from research.core.errors import UserError
from research.storage import files
from research.storage.paths import Path, in_bucket, reason
from research.training.presence import Presence
from research.training.trackers import Tracker

logger = logging.getLogger("tessera")

FILE = "metrics.jsonl"
BOARD = "tensorboard"
# Seconds after which new rows are uploaded to a bucket, where no checkpoint is saved meanwhile.
UPLOAD_SECONDS = 30.0


class MetricsWriter:
    """Appends rows to a workdir's metrics; on processes other than the first it does nothing.

    After a resume the file is that of an uninterrupted run: rows after the checkpoint are dropped,
    and will be written again. So a step's training row must be written, and flushed, before its
    checkpoint is saved.

    A file in a bucket cannot be appended to: there the files are local, and uploaded as a whole.

    Args:
      workdir: the run's folder.
      resumed_step: the step of the checkpoint that the run resumes from; 0 begins a run.
      trackers: get the rows too; who opened them closes them.
    """

    def __init__(self, workdir: Path, resumed_step: int = 0, trackers: Sequence[Tracker] = ()):
        self._trackers = trackers
        self._folder: pathlib.Path | None = None
        if jax.process_index() != 0:
            return
        # Deferred: importing it takes more than a second, which no verb that only reads metrics
        # should pay.
        from research.training.tensorboard import Board

        self._workdir = workdir
        files.make_folder(workdir)
        _drop_rows_after(workdir / FILE, resumed_step)
        if in_bucket(workdir):
            self._folder = pathlib.Path(tempfile.mkdtemp(prefix="tessera-metrics-"))
            if (workdir / FILE).exists():
                (self._folder / FILE).write_bytes((workdir / FILE).read_bytes())
        else:
            self._folder = workdir
        self._file = (self._folder / FILE).open("a", encoding="utf-8")
        self._failed = False  # whether a row could not be written
        # In a bucket the file of metrics comes with the first upload only.
        watched = "config.json" if in_bucket(workdir) else FILE
        self._presence = Presence(workdir, watched)
        self._board = Board(self._folder / BOARD, resumed_step)
        self._flushed = time.monotonic()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one row, atomically; a bucket gets it at the next `flush`.

        Args:
          step: steps done, from 1.
          metrics: slash-separated names -> numbers, or arrays of one number; None where unknown.

        Raises:
          UserError: the file cannot be written, or is gone.
        """
        if self._folder is None:
            return
        values = {name: _number(value) for name, value in metrics.items()}
        row = {"step": int(step)}
        for name, value in values.items():
            row[name] = _jsonable(value)
        line = json.dumps(row, allow_nan=False)

        # A bucket is asked at uploads only: each question is a request.
        if not in_bucket(self._workdir):
            self._presence.check()
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            self._failed = True
            raise UserError(f"{self._folder / FILE} cannot be written: {reason(error)}.") from error

        # TensorBoard and trackers have no word for unknown: such a number is left out there.
        known = {name: value for name, value in values.items() if value is not None}
        self._board.write(int(step), known)
        for tracker in self._trackers:
            tracker.write(int(step), known)

        seconds = time.monotonic() - self._flushed
        if in_bucket(self._workdir) and seconds >= UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes out TensorBoard's numbers, and uploads all to a bucket.

        Raises:
          UserError: the workdir is gone.
        """
        if self._folder is None:
            return
        self._presence.check()
        self._board.flush()
        if in_bucket(self._workdir):
            files.upload(self._folder, self._workdir)
        self._flushed = time.monotonic()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Flushes and closes the files; after a failed write, which was raised, raises nothing."""
        if self._folder is None:
            return
        if self._failed:
            # Closing tries to write the same row again.
            with contextlib.suppress(OSError):
                self._file.close()
            return
        self._file.close()
        self._board.close()
        if in_bucket(self._workdir):
            if not self._presence.is_gone():
                files.upload(self._folder, self._workdir)
            files.remove_folder(self._folder)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of a workdir, in order; lines that are no rows are left out."""
    return [row for _, row in _rows(workdir / FILE) if row is not None]


def evaluations(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of held-out metrics of a workdir, in order."""
    return [row for row in read_metrics(workdir) if "eval/loss" in row]


def curve(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of one metric, from the rows that have it."""
    known = [row for row in rows if row.get(name) is not None]
    steps = [row["step"] for row in known]
    values = [row[name] for row in known]
    return steps, values


def memory_in_use() -> tuple[int, str]:
    """Returns bytes, and whose they are.

    It is the peak of a "device" of this process, where devices report it, or else what the
    "process" has now (its resident set).
    """
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    if peaks:
        return max(peaks), "device"
    return psutil.Process().memory_info().rss, "process"


def format_line(step: int, total: int, row: Mapping[str, float | int | None]) -> str:
    """Returns the log line: step loss grad_norm lr tokens/s tokens/s/device mfu memory step_ms eta.

    Args:
      step: steps done.
      total: steps of the run.
      row: mean loss, gradient norm and learning rate under `train/`, tokens per second and mfu
        (None where the peak of the devices is unknown) under `throughput/`, and `time/step_ms`.
    """
    mfu = row["throughput/mfu"]
    utilization = "unknown" if mfu is None else f"{100 * mfu:.1f}% (causal half)"
    memory, owner = memory_in_use()
    remaining_ms = (total - step) * row["time/step_ms"]
    eta = datetime.timedelta(seconds=round(remaining_ms / 1000))
    fields = (
        f"step {step:>{len(str(total))}}/{total}",
        f"loss {row['train/loss']:.4f}",
        f"grad_norm {row['train/grad_norm']:.3f}",
        f"lr {row['train/learning_rate']:.3e}",
        f"tokens/s {row['throughput/tokens_per_second']:,.0f}",
        f"tokens/s/device {row['throughput/tokens_per_second_per_device']:,.0f}",
        f"mfu {utilization}",
        f"memory {memory / 2**30:.2f} GiB ({owner})",
        f"step_ms {row['time/step_ms']:.1f}",
        f"eta {eta}",
    )
    return "  ".join(fields)


def format_evaluation(row: Mapping[str, float | int]) -> str:
    """Returns the log line of a row of held-out metrics."""
    fields = [f"step {row['step']}"]
    fields += [f"{name} {value:.4f}" for name, value in row.items() if name != "step"]
    return "  ".join(fields)


def _drop_rows_after(path: Path, step: int) -> None:
    """Rewrites the file atomically without later rows and torn lines."""
    if not path.exists():
        return
    rows = _rows(path)
    valid = [(line, row) for line, row in rows if row is not None]
    kept = [line for line, row in valid if row["step"] <= step]
    if len(kept) == len(rows):
        return
    logger.info(
        "%s: %d rows after step %d dropped; they will be written again.",
        path,
        len(rows) - len(kept),
        step,
    )
    files.write_text(path, "".join(line + "\n" for line in kept))


def _rows(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """Returns the lines of a file, each with its row, or None where it is no row."""
    if not path.exists():
        return []
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    return [(line, _parse(line)) for line in lines]


def _parse(line: str) -> dict[str, Any] | None:
    """Returns the row of a line, or None where it is torn or edited."""
    try:
        row = json.loads(line)
        # `true` is an int for isinstance.
        if not isinstance(row, dict) or type(row["step"]) is not int:
            return None
        # "NaN" and "Infinity" become numbers; any other string is an error.
        values = {
            name: float(value) if isinstance(value, str) else value for name, value in row.items()
        }
    except (ValueError, KeyError, RecursionError):
        return None
    numeric = all(value is None or isinstance(value, (int, float)) for value in values.values())
    return values if numeric else None


def _number(value: Any) -> float | int | None:
    if value is None or isinstance(value, int):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _jsonable(value: float | int | None) -> float | int | str | None:
    if value is None or math.isfinite(value):
        return value
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"

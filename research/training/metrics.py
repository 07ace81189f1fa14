"""The numbers of a run: `metrics.jsonl`, one row a line, the same for TensorBoard, and the line of
the log.

A row is `{"step": …, "train/loss": …}`. JSON has no words for the numbers that are not finite, so
these are written as the strings "NaN", "Infinity" and "-Infinity", which Python's `float()` and
JavaScript's `Number()` read back; null is a number that is not known (the utilization of a device
whose peak nobody has told).
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
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import psutil

from research.core.errors import UserError
from research.storage import files
from research.storage.paths import Path, in_bucket, reason
from research.training.presence import Presence

logger = logging.getLogger("tessera")

FILE, BOARD = "metrics.jsonl", "tensorboard"
# Seconds after which a bucket gets what is new, where no checkpoint is saved meanwhile.
UPLOAD_SECONDS = 30.0


class MetricsWriter:
    """Appends rows to a workdir's metrics; on processes other than the first it does nothing.

    After a resume the rows end as those of an unbroken run do: what was written after the
    checkpoint is dropped, for it will be written again. So a step's training row must be written,
    and flushed, before its checkpoint is saved.

    Nothing is appended to a file in a bucket: there the files lie on this machine, and are uploaded
        as wholes.

    Args:
      workdir: the run's folder.
      resumed_step: the step from which the run goes on; 0 begins anew.
    """

    def __init__(self, workdir: Path, resumed_step: int = 0):
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
        self._presence = Presence(workdir, "config.json" if in_bucket(workdir) else FILE)
        self._board = Board(self._folder / BOARD, resumed_step)
        self._flushed = time.monotonic()

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one row; it is in the file, whole, when this returns, or in a bucket after
        `flush`.

        Args:
          step: steps done, from 1.
          metrics: slash-separated names -> numbers, or arrays of one number; None where unknown.

        Raises:
          UserError: the file cannot be written, or is gone.
        """
        if self._folder is None:
            return
        values = {name: _number(value) for name, value in metrics.items()}
        row = {"step": int(step)} | {name: _jsonable(value) for name, value in values.items()}
        if not in_bucket(self._workdir):
            self._presence.check()
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            self._failed = True
            raise UserError(f"{self._folder / FILE} cannot be written: {reason(error)}.") from error
        self._board.write(
            int(step), {name: value for name, value in values.items() if value is not None}
        )
        if in_bucket(self._workdir) and time.monotonic() - self._flushed >= UPLOAD_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Brings the rows, and the numbers for TensorBoard, to where they are kept.

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
        """Flushes and closes the files. After a fault that was raised there is nothing more to say
        about them.
        """
        if self._folder is None:
            return
        if self._failed:
            with contextlib.suppress(OSError):  # it tries to write the same row again
                self._file.close()
            return
        self._file.close()
        self._board.close()
        if in_bucket(self._workdir):
            if not self._presence.is_gone():
                files.upload(self._folder, self._workdir)
            files.remove_folder(self._folder)


def read_metrics(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of a workdir, in order, numbers that are not finite as floats; what is no
    row is left out.
    """
    return [row for _, row in _rows(workdir / FILE) if row is not None]


def evaluations(workdir: Path) -> list[dict[str, Any]]:
    """Returns the rows of held-out metrics of a workdir, in order."""
    return [row for row in read_metrics(workdir) if "eval/loss" in row]


def curve(rows: Iterable[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Returns the steps and values of one metric, from the rows that know it."""
    points = [(row["step"], row[name]) for row in rows if name in row and row[name] is not None]
    return [step for step, _ in points], [value for _, value in points]


def memory_in_use() -> tuple[int, str]:
    """Returns bytes and whose they are: the most that a "device" of this process has held, where
    devices tell, else what the "process" holds now (its resident set)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if stat and "peak_bytes_in_use" in stat]
    return (max(peaks), "device") if peaks else (psutil.Process().memory_info().rss, "process")


def format_line(step: int, total: int, row: Mapping[str, float | int | None]) -> str:
    """Returns the log line: step loss grad_norm lr tokens/s tokens/s/device mfu memory step_ms eta.

    Args:
      step: steps done.
      total: steps of the run.
      row: loss, gradient norm and learning rate under `train/`, tokens per second and mfu (None
        where the peak of the devices is not known) under `throughput/`, and `time/step_ms`.
    """
    mfu, (held, whose) = row["throughput/mfu"], memory_in_use()
    eta = datetime.timedelta(seconds=round((total - step) * row["time/step_ms"] / 1000))
    return "  ".join(
        (
            f"step {step:>{len(str(total))}}/{total}",
            f"loss {row['train/loss']:.4f}",
            f"grad_norm {row['train/grad_norm']:.3f}",
            f"lr {row['train/learning_rate']:.3e}",
            f"tokens/s {row['throughput/tokens_per_second']:,.0f}",
            f"tokens/s/device {row['throughput/tokens_per_second_per_device']:,.0f}",
            f"mfu {'unknown' if mfu is None else f'{100 * mfu:.1f}% (causal half)'}",
            f"memory {held / 2**30:.2f} GiB ({whose})",
            f"step_ms {row['time/step_ms']:.1f}",
            f"eta {eta}",
        )
    )


def format_evaluation(row: Mapping[str, float | int]) -> str:
    """Returns the log line of a row of held-out metrics."""
    return "  ".join(
        [f"step {row['step']}"] + [f"{name} {row[name]:.4f}" for name in row if name != "step"]
    )


def _drop_rows_after(path: Path, step: int) -> None:
    """Rewrites the file without later rows and torn lines, at once: whoever reads sees the old file
    or the new one.
    """
    if not path.exists():
        return
    rows = _rows(path)
    kept = [line for line, row in rows if row is not None and row["step"] <= step]
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
    """Returns the lines of a file, each with its row, or None where it is torn or changed by
    another hand.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    return [(line, _parse(line)) for line in lines]


def _parse(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        if not isinstance(row, dict) or type(row["step"]) is not int:
            return None
        # The words for numbers that are not finite become numbers; any other word is an error.
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
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"

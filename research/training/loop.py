"""The one loop over steps: batches, metrics, checkpoints, evaluation and signals.

It knows nothing of what a step computes.
"""

import dataclasses
import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
from jax.experimental import multihost_utils

from research.core.errors import Interrupted, UserError
from research.core.progress import Progress
from research.data.batch import Batch
from research.training.checkpoints import Checkpoints
from research.training.clock import Clock
from research.training.config import TrainConfig
from research.training.gradients import Metrics
from research.training.loss_mean import LossMean
from research.training.metrics import MetricsWriter, format_evaluation, format_line
from research.training.state import TrainState
from research.training.step import Step

logger = logging.getLogger("tessera")


@runtime_checkable  # so that the tests' checks of types can look at it
class Stream(Protocol):
    """A stream of host batches whose position can be saved.

    The batches are of a corpus, or of samples of the model itself.
    """

    def next(self, state: TrainState) -> Batch:
        """Returns the next batch; samples of the model itself are drawn with `state`."""

    def state(self) -> dict[str, Any]:
        """Returns the position: JSON values and small arrays, the same on all processes."""

    def restore(self, state: dict[str, Any]) -> None:
        """Resumes from what `state` returned."""


@dataclasses.dataclass(frozen=True)
class Throughput:
    """Turns tokens and seconds into rates.

    Attributes:
      flops_per_token: of forward and backward pass, causal attention counted as half.
      peak_flops: per second, of all devices together; None where a device is unknown.
      num_devices: of the run.
    """

    flops_per_token: float
    peak_flops: float | None
    num_devices: int

    def rates(self, tokens: float, seconds: float) -> dict[str, float | None]:
        """Returns the rates of `tokens` tokens, without padding, in `seconds`."""
        rate = tokens / seconds
        mfu = None
        if self.peak_flops is not None:
            # 1e6 tokens per second of 6e9 FLOPs each, on devices that can do 1e16 -> 0.6
            mfu = rate * self.flops_per_token / self.peak_flops
        return {
            "throughput/tokens_per_second": rate,
            "throughput/tokens_per_second_per_device": rate / self.num_devices,
            "throughput/mfu": mfu,
        }


@dataclasses.dataclass
class Run:
    """What the loop calls.

    Attributes:
      step: compiled.
      frozen: what the step reads beside its state.
      stream: the batches of this process.
      shard_batch: puts a host batch on the devices.
      check: called with the first state and batch; raises where the kernels compute wrong values.
      evaluate: held-out metrics of a state.
      saved: from a state to the one that a checkpoint keeps.
      checkpoints: of the workdir.
      writer: of the metrics.
      clock: of the categories of time.
      throughput: for the rates.
    """

    step: Step
    frozen: Any
    stream: Stream
    shard_batch: Callable[[Batch], Batch]
    check: Callable[[TrainState, Batch], None]
    evaluate: Callable[[TrainState], dict[str, float]]
    saved: Callable[[TrainState], Any]
    checkpoints: Checkpoints
    writer: MetricsWriter
    clock: Clock
    throughput: Throughput


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT, which would end the process; a second SIGINT interrupts at once.

    With several processes, JAX itself catches SIGTERM and notifies the others: there SIGINT is
    raised again as SIGTERM.
    """
    caught: list[int] = []
    many = jax.process_count() > 1

    # A handler may run between any two lines of Python: it only notes the signal, and the loop
    # stops after its step.
    def catch(number: int, frame: Any) -> None:
        if number == signal.SIGINT and caught:
            raise KeyboardInterrupt
        caught.append(number)
        if many:
            signal.raise_signal(signal.SIGTERM)

    numbers = (signal.SIGINT,) if many else (signal.SIGTERM, signal.SIGINT)
    previous = {number: signal.signal(number, catch) for number in numbers}
    try:
        yield caught
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@dataclasses.dataclass(frozen=True)
class Unfinished:
    """What a run had not finished at the step of a checkpoint.

    Attributes:
      evaluation: whether the state is still to be evaluated.
      losses: of the steps since the last row of the metrics.
    """

    evaluation: bool = False
    losses: LossMean = dataclasses.field(default_factory=LossMean)

    def to_extra(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps of it."""
        # On disk the name is an older one than `evaluation`.
        return {"evaluation_owed": self.evaluation, "losses": dataclasses.asdict(self.losses)}

    @classmethod
    def from_extra(cls, extra: Mapping[str, Any]) -> "Unfinished":
        """Returns what a checkpoint keeps; those of older versions have no losses."""
        return cls(extra["evaluation_owed"], LossMean(**extra.get("losses", {})))


class _Due(NamedTuple):
    """What follows a step.

    Attributes:
      evaluation: whether the state is evaluated.
      checkpoint: whether it is saved.
      stop: the signal that ends the run, or 0.
    """

    evaluation: bool
    checkpoint: bool
    stop: int


def run_loop(
    state: TrainState, run: Run, config: TrainConfig, unfinished: Unfinished | None = None
) -> TrainState:
    """Takes the state from its step to the last one, and returns it.

    Metrics of a step are fetched after the next is dispatched, so the devices never wait for the
    host. A state is saved before it is evaluated: evaluation may take longer than whoever sent a
    signal waits.

    Args:
      state: the first state; its buffers are donated.
      run: what to call.
      config: steps, logging and evaluation.
      unfinished: of the checkpoint that the state is from; None at the first step of a run.

    Raises:
      Interrupted: SIGTERM or SIGINT came; the state was saved first.
      UserError: several steps in a row were not finite; the last checkpoint stays the newest.
    """
    clock = run.clock
    first = int(state.step)
    unfinished = unfinished or Unfinished()
    log = _MetricsLog(run, config, first, unfinished.losses)
    with (
        _stop_signals() as signals,
        Progress("train", config.steps - first, "step", lines=False) as progress,
    ):
        if unfinished.evaluation:
            log.evaluate(first, state)

        for index in range(first, config.steps):
            with clock.measure("data"):
                batch = run.shard_batch(run.stream.next(state))
            # On real rows, before they change a parameter.
            if index == first:
                with clock.measure("compile"):
                    run.check(state, batch)

            # The step is dispatched, and computed while the host records the one before.
            with clock.measure("compute"):
                state, metrics = run.step(state, run.frozen, batch)
                log.record()
                log.defer(index + 1, metrics)
                progress.advance()
                due = _due(run, config, index, signals)
                # A checkpoint keeps the losses of all steps before it, so this step's are waited
                # for; and its row comes before that of an evaluation.
                if due.evaluation or due.checkpoint:
                    log.record()

            if log.diverged:
                raise UserError(log.diverged)
            _finish_step(state, run, log, index + 1, due)
    with clock.measure("checkpoint"):
        run.checkpoints.wait()
    return state


def _due(run: Run, config: TrainConfig, index: int, signals: list[int]) -> _Due:
    """Returns what follows the step of this index."""
    step = index + 1
    last = step == config.steps
    stop = _agreed_stop(signals, index)
    evaluation = last or (config.eval_every > 0 and step % config.eval_every == 0)
    checkpoint = last or bool(stop) or run.checkpoints.due(step)
    return _Due(evaluation, checkpoint, stop)


def _finish_step(state: TrainState, run: Run, log: "_MetricsLog", step: int, due: _Due) -> None:
    """Saves, stops or evaluates after a step, in this order."""
    if due.checkpoint:
        with run.clock.measure("checkpoint"):
            # An evaluation that is due comes after the checkpoint: a run that is killed during it
            # evaluates when it resumes.
            unfinished = Unfinished(due.evaluation, log.losses)
            extra = {"loader": run.stream.state(), **unfinished.to_extra()}
            # Rows before the checkpoint are not written again after a resume.
            run.writer.flush()
            run.checkpoints.save(step, run.saved(state), extra)
    if due.stop:
        run.checkpoints.wait()
        name = signal.Signals(due.stop).name
        raise Interrupted(
            f"stopped by {name} after step {step}; the same command resumes from there"
        )
    if due.evaluation:
        log.evaluate(step, state)


def _agreed_stop(signals: list[int], index: int) -> int:
    """Returns the signal to stop for, or 0; all processes of a run stop after the same step."""
    if jax.process_count() > 1:
        # It is true on all processes after the same index, also where one of them got the signal.
        stop = multihost_utils.reached_preemption_sync_point(index)
        return int(signal.SIGTERM) if stop else 0
    return signals[0] if signals else 0


class _MetricsLog:
    """Turns the metrics of steps into rows and log lines, and notices divergence.

    Attributes:
      losses: of the steps since the last row.
      diverged: why the run cannot continue, or "".
    """

    def __init__(self, run: Run, config: TrainConfig, first: int, losses: LossMean):
        self.losses = dataclasses.replace(losses)
        self._run = run
        self._config = config
        # The step whose metrics were not fetched yet.
        self._deferred: tuple[int, Metrics] | None = None
        # Since the last row: tokens, its step, and the seconds at which it was written.
        self._tokens = 0.0
        self._row_step = first
        self._row_seconds = self._busy_seconds()
        self.diverged = ""

    def defer(self, step: int, metrics: Metrics) -> None:
        """Keeps the metrics of a dispatched step for the next `record`."""
        assert self._deferred is None
        self._deferred = (step, metrics)

    def record(self) -> None:
        """Waits for the deferred metrics; writes a row where one is due."""
        if self._deferred is None:
            return
        step, metrics = self._deferred
        self._deferred = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._tokens += values.pop("tokens")
        weight = values.pop("weight")
        # The loss of a skipped step may be NaN, which would make the mean NaN.
        if not values["skipped_in_row"]:
            self.losses.add(values["loss"], weight)
        self._check_finite(step, int(values["skipped_in_row"]))
        if step % self._config.log_every == 0 or step == self._config.steps or self.diverged:
            self._write_row(step, values)

    def evaluate(self, step: int, state: TrainState) -> None:
        """Evaluates a state; writes and logs its held-out metrics."""
        with self._run.clock.measure("evaluation"):
            values = self._run.evaluate(state)
        self._run.writer.write(step, values)
        logger.info("%s", format_evaluation({"step": step, **values}))

    def _check_finite(self, step: int, skipped_in_row: int) -> None:
        """Warns of a skipped step; notes divergence after too many in a row."""
        if skipped_in_row >= self._config.max_skipped and not self.diverged:
            # Batches of 8 rows: step 3 had the rows 16 to 23.
            rows = self._config.batch_size
            self.diverged = (
                f"step {step}: loss or gradient was not finite {skipped_in_row} times in a row "
                f"(train.max_skipped); the batch holds rows {(step - 1) * rows} to "
                f"{step * rows - 1} of the order."
            )
        elif skipped_in_row:
            logger.warning(
                "step %d: loss or gradient is not finite; skipped, nothing was changed", step
            )

    def _write_row(self, step: int, values: dict[str, float]) -> None:
        now = self._busy_seconds()
        seconds = max(now - self._row_seconds, 1e-9)
        steps = max(step - self._row_step, 1)

        row = {f"train/{name}": value for name, value in values.items()}
        row["train/step_loss"] = values["loss"]
        row["train/loss"] = self.losses.value()
        row |= self._run.throughput.rates(self._tokens, seconds)
        row["time/step_ms"] = 1000 * seconds / steps
        row |= {f"time/{name}": spent for name, spent in self._run.clock.seconds().items()}

        self.losses = LossMean()
        self._tokens = 0.0
        self._row_step = step
        self._row_seconds = now
        self._run.writer.write(step, row)
        logger.info("%s", format_line(step, self._config.steps, row))

    def _busy_seconds(self) -> float:
        """Returns the seconds that count in rates: steps, and the wait for their batches."""
        seconds = self._run.clock.seconds()
        return seconds["compute"] + seconds["data"]

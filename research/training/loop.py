"""The one loop. It knows a step and a stream of batches, and nothing of what they mean."""

import dataclasses
import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import jax
from jax.experimental import multihost_utils

from research.core.errors import Interrupted, UserError
from research.core.progress import Progress
from research.data.batch import Batch
from research.training.checkpoints import Checkpoints
from research.training.clock import Clock
from research.training.config import TrainConfig
from research.training.metrics import MetricsWriter, format_evaluation, format_line
from research.training.state import TrainState
from research.training.step import Metrics, Step

logger = logging.getLogger("tessera")


@runtime_checkable  # so that the tests' checks of types can look at it
class Stream(Protocol):
    """A stream of host batches whose position can be saved: of a corpus, or of what the model
    itself has drawn.
    """

    def next(self, state: TrainState) -> Batch:
        """Returns the next batch; a stream of the model's own samples draws them from `state`."""

    def state(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: JSON values and small NumPy arrays, the same on all
        processes.
        """

    def restore(self, state: dict[str, Any]) -> None:
        """Resumes from what `state` returned."""


@dataclasses.dataclass(frozen=True)
class Throughput:
    """What turns a step's time into rates.

    Attributes:
      flops_per_token: of forward and backward pass, causal attention counted as half.
      peak_flops: of all devices together, a second; None where a device is unknown.
      num_devices: of the run.
    """

    flops_per_token: float
    peak_flops: float | None
    num_devices: int

    def rates(self, tokens: float, seconds: float) -> dict[str, float | None]:
        """Returns rates of `tokens` real tokens (padding left out) in `seconds`."""
        rate = tokens / seconds
        mfu = None if self.peak_flops is None else rate * self.flops_per_token / self.peak_flops
        return {
            "throughput/tokens_per_second": rate,
            "throughput/tokens_per_second_per_device": rate / self.num_devices,
            "throughput/mfu": mfu,
        }


@dataclasses.dataclass
class Run:
    """What the loop drives.

    Attributes:
      step: compiled.
      frozen: what the step reads beside its state.
      stream: the batches of this process.
      shard_batch: puts a host batch on the devices.
      check: looks at the first batch and the state that meets it, and raises where the kernels
          cannot be trusted.
      evaluate: held-out metrics of a state.
      saved: what a checkpoint keeps of a state.
      checkpoints: where the state is kept.
      writer: where metrics go.
      clock: where time goes.
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
    """Collects SIGTERM and SIGINT instead of dying of them; a second SIGINT interrupts at once.

    Of many processes, JAX itself catches SIGTERM and tells the others, so there SIGINT is turned
    into that.
    """
    caught: list[int] = []
    many = jax.process_count() > 1

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


def run_loop(
    state: TrainState, run: Run, config: TrainConfig, evaluation_pending: bool = False
) -> TrainState:
    """Takes the state from its step to the last one.

    Metrics of a step are read after the next one is under way, so the devices never wait for the
    host. A step's state is saved before it is evaluated, which may take longer than whoever stops
    the run is ready to wait.

    Args:
      state: where to go on; its buffers are given up.
      run: what to drive.
      config: the course.
      evaluation_pending: whether the state was saved at a step whose evaluation did not come about.

    Raises:
      Interrupted: SIGTERM or SIGINT came; the state was saved first.
      UserError: several steps in a row were not finite; the last checkpoint stays the newest.
    """
    clock, first = run.clock, int(state.step)
    meter = _Meter(run, config, first)
    with (
        _stop_signals() as signals,
        Progress("train", config.steps - first, "step", lines=False) as progress,
    ):
        if evaluation_pending:
            meter.evaluate(first, state)
        pending: tuple[int, Metrics] | None = None
        for index in range(first, config.steps):
            with clock.measure("data"):
                batch = run.shard_batch(run.stream.next(state))
            if index == first:
                with clock.measure("compile"):
                    run.check(state, batch)
            # The devices compute while the host keeps its books, so that is no time of its own.
            with clock.measure("compute"):
                state, metrics = run.step(state, run.frozen, batch)
                if pending is not None:
                    meter.read(*pending)
                step, pending = index + 1, (index + 1, metrics)
                progress.advance()
                last, stop = step == config.steps, _agreed_stop(signals, index)
                evaluates = last or (config.eval_every > 0 and step % config.eval_every == 0)
                saves = last or stop or run.checkpoints.due(step)
                if evaluates or saves:
                    meter.read(*pending)
                    pending = None
            if meter.diverged:
                raise UserError(meter.diverged)
            if saves:
                with clock.measure("checkpoint"):
                    extra = {"loader": run.stream.state(), "evaluation_owed": evaluates}
                    run.writer.flush()
                    run.checkpoints.save(step, run.saved(state), extra)
            if stop:
                run.checkpoints.wait()
                name = signal.Signals(stop).name
                raise Interrupted(
                    f"stopped by {name} after step {step}; the same command resumes from there"
                )
            if evaluates:
                meter.evaluate(step, state)
    with clock.measure("checkpoint"):
        run.checkpoints.wait()
    return state


def _agreed_stop(signals: list[int], step: int) -> int:
    """Returns the signal to stop for, or 0; all processes of a run stop after the same step."""
    if jax.process_count() > 1:
        return int(signal.SIGTERM) if multihost_utils.reached_preemption_sync_point(step) else 0
    return signals[0] if signals else 0


class _Meter:
    """Turns the metrics of steps into rows and lines, and watches for divergence."""

    def __init__(self, run: Run, config: TrainConfig, first: int):
        self._run, self._config = run, config
        self._tokens, self._counted = 0.0, first
        self._since = self._busy()
        self.diverged = ""

    def _busy(self) -> float:
        """Seconds that count in rates: steps and the wait for their batches."""
        seconds = self._run.clock.seconds()
        return seconds["compute"] + seconds["data"]

    def read(self, step: int, metrics: Metrics) -> None:
        """Waits for a step's metrics; logs them where a line is due."""
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self._tokens += values.pop("tokens")
        if values["skipped_in_row"] >= self._config.max_skipped and not self.diverged:
            rows = self._config.batch_size
            self.diverged = (
                f"step {step}: loss or gradient was not finite {int(values['skipped_in_row'])} "
                "times in a row "
                f"(train.max_skipped); the batch holds rows {(step - 1) * rows} to "
                f"{step * rows - 1} of the order."
            )
        elif values["skipped_in_row"]:
            logger.warning(
                "step %d: loss or gradient is not finite; skipped, nothing was changed", step
            )
        if step % self._config.log_every == 0 or step == self._config.steps or self.diverged:
            self._report(step, values)

    def _report(self, step: int, values: dict[str, float]) -> None:
        now = self._busy()
        seconds, steps = max(now - self._since, 1e-9), step - self._counted
        row = {f"train/{name}": value for name, value in values.items()}
        row |= self._run.throughput.rates(self._tokens, seconds)
        row["time/step_ms"] = 1000 * seconds / max(steps, 1)
        row |= {f"time/{name}": value for name, value in self._run.clock.seconds().items()}
        self._tokens, self._counted, self._since = 0.0, step, now
        self._run.writer.write(step, row)
        logger.info("%s", format_line(step, self._config.steps, row))

    def evaluate(self, step: int, state: TrainState) -> None:
        """Evaluates a state; writes and logs its held-out metrics."""
        with self._run.clock.measure("evaluation"):
            values = self._run.evaluate(state)
        self._run.writer.write(step, values)
        logger.info("%s", format_evaluation({"step": step, **values}))

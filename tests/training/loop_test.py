"""The loop drives a step: order of events, rates, signals, divergence. The step here adds one to a
number.
"""

import os
import pathlib
import signal
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import Interrupted, UserError
from research.training.checkpoints import CheckpointConfig, Checkpoints
from research.training.clock import Clock
from research.training.config import TrainConfig
from research.training.loop import Run, Throughput, Unfinished, run_loop
from research.training.metrics import MetricsWriter, read_metrics
from research.training.state import TrainState

TOKENS = 6.0


def first_state() -> TrainState:
    def counter() -> jax.Array:
        return jnp.zeros((), jnp.int32)

    return TrainState(counter(), {"w": jnp.zeros(())}, (), None, counter(), counter())


class Bench:
    """A run whose every event is recorded, on a clock that only its parts move: a step takes 2 s,
    evaluation 100 s.
    """

    def __init__(self, workdir: pathlib.Path, every: int = 100, resumed_step: int = 0):
        self.workdir, self.events, self.time, self.given = workdir, [], 0.0, 0
        self.checked: list[int] = []
        self.bad: set[int] = set()
        self.weights: dict[int, float] = {}
        self.at: dict[int, Callable[[], None]] = {}
        self.checkpoints = Checkpoints(workdir, CheckpointConfig(every=every))
        self.writer = MetricsWriter(workdir, resumed_step)
        self.clock = Clock(lambda: self.time)

    def step(
        self, state: TrainState, frozen: Any, batch: Any
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        number = int(state.step) + 1
        self.time += 2
        self.events.append(f"step {number}")
        if number in self.at:
            self.at[number]()
        bad = jnp.int32(number in self.bad)
        row = (state.skipped_in_row + 1) * bad
        loss = float(number) if number not in self.bad else float("nan")
        values = {"loss": loss, "grad_norm": 1.0, "learning_rate": 0.1, "tokens": TOKENS}
        values["weight"] = self.weights.get(number, 1.0)
        metrics = {name: jnp.float32(value) for name, value in values.items()}
        metrics |= {
            "skipped": (state.skipped + bad).astype(jnp.float32),
            "skipped_in_row": row.astype(jnp.float32),
        }
        new = state.replace(
            step=state.step + 1,
            params={"w": state.params["w"] + 1},
            skipped=state.skipped + bad,
            skipped_in_row=row,
        )
        return new, metrics

    def next(self, state: TrainState) -> dict[str, np.ndarray]:
        self.given += 1
        assert int(state.step) == self.given - 1, "a stream is handed the newest state"
        return {"tokens": np.zeros((2, 3), np.int32)}

    def state(self) -> dict[str, Any]:
        return {"given": self.given}

    def restore(self, state: dict[str, Any]) -> None:
        self.given = state["given"]

    def check(self, state: TrainState, batch: Any) -> None:
        self.checked.append(int(state.step))

    def evaluate(self, state: TrainState) -> dict[str, float]:
        self.time += 100
        self.events.append(f"evaluate {int(state.step)}")
        return {"eval/loss": 1.0}

    def resume(self) -> tuple[TrainState, Unfinished]:
        _, state, extra = self.checkpoints.restore(jax.eval_shape(first_state))
        self.given = extra["loader"]["given"]
        return state, Unfinished.from_extra(extra)

    def train(
        self,
        state: TrainState | None = None,
        unfinished: Unfinished | None = None,
        **config: Any,
    ) -> TrainState:
        shard_batch = lambda batch: jax.tree.map(jnp.asarray, batch)  # noqa: E731
        throughput = Throughput(flops_per_token=10.0, peak_flops=100.0, num_devices=4)
        run = Run(
            step=self.step,
            frozen={},
            stream=self,
            shard_batch=shard_batch,
            check=self.check,
            evaluate=self.evaluate,
            saved=lambda state: state,
            checkpoints=self.checkpoints,
            writer=self.writer,
            clock=self.clock,
            throughput=throughput,
        )
        try:
            return run_loop(
                state or first_state(),
                run,
                TrainConfig(batch_size=2, sequence_length=3, **config),
                unfinished,
            )
        finally:
            self.writer.close()
            self.checkpoints.close()

    def rows(self) -> list[dict[str, Any]]:
        return [row for row in read_metrics(self.workdir) if "train/loss" in row]


def test_metrics_are_read_when_the_next_step_is_under_way(tmp_path, monkeypatch):
    bench = Bench(tmp_path)
    write = MetricsWriter.write

    def writing(self: MetricsWriter, step: int, metrics: Any) -> None:
        bench.events.append(f"row {step}")
        write(self, step, metrics)

    monkeypatch.setattr(MetricsWriter, "write", writing)
    bench.train(steps=4, log_every=1, eval_every=3)
    assert bench.events == [
        *("step 1", "step 2", "row 1", "step 3", "row 2", "row 3", "evaluate 3", "row 3"),
        *("step 4", "row 4", "evaluate 4", "row 4"),
    ]


def test_rates_count_steps_alone_and_only_real_tokens(tmp_path):
    bench = Bench(tmp_path, every=2)
    bench.train(steps=6, log_every=2, eval_every=2)
    for row in bench.rows():
        assert row["throughput/tokens_per_second"] == TOKENS / 2
        assert row["throughput/tokens_per_second_per_device"] == TOKENS / 2 / 4
        assert row["throughput/mfu"] == TOKENS / 2 * 10 / 100
        assert row["time/step_ms"] == 2000
    assert bench.clock.seconds()["evaluation"] == 300
    assert bench.clock.seconds()["compute"] == 12
    assert bench.clock.seconds()["other"] == 0


def test_rows_stand_at_every_logged_step_and_the_last(tmp_path):
    bench = Bench(tmp_path)
    bench.train(steps=7, log_every=3)
    assert [row["step"] for row in bench.rows()] == [3, 6, 7]
    assert [row["train/step_loss"] for row in bench.rows()] == [3, 6, 7]


def test_the_loss_of_a_row_is_the_mean_since_the_row_before_by_weight(tmp_path, caplog):
    bench = Bench(tmp_path)
    bench.weights = {1: 5.0, 2: 0.0, 3: 3.0}
    with caplog.at_level("INFO", "tessera"):
        bench.train(steps=7, log_every=3)
    assert [row["train/loss"] for row in bench.rows()] == [(5 * 1 + 3 * 3) / 8, 5, 7]
    lines = [record.message for record in caplog.records if "grad_norm" in record.message]
    assert [line.split("  ")[1] for line in lines] == ["loss 1.7500", "loss 5.0000", "loss 7.0000"]


def test_skipped_steps_are_left_out_of_the_mean_loss(tmp_path):
    bench = Bench(tmp_path)
    bench.bad = {2, 4, 5, 6}
    bench.train(steps=9, log_every=3)
    means = [row["train/loss"] for row in bench.rows()]
    np.testing.assert_equal(means, [(1 + 3) / 2, np.nan, 8])  # no step of the second row counts


@pytest.mark.parametrize(("step", "losses"), [(2, 2), (3, 0), (4, 0), (5, 1)])
def test_a_run_stopped_between_rows_has_the_losses_of_an_unbroken_one(tmp_path, step, losses):
    def bench(name: str, resumed_step: int = 0) -> Bench:
        bench = Bench(tmp_path / name, resumed_step=resumed_step)
        bench.weights = {number: 0.1 * number for number in range(1, 10)}
        bench.bad = {4}
        return bench

    unbroken, stopped = bench("unbroken"), bench("resumed")
    unbroken.train(steps=9, log_every=3)
    stopped.at[step] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted):
        stopped.train(steps=9, log_every=3)

    resumed = bench("resumed", step)
    state, unfinished = resumed.resume()
    assert unfinished.losses.steps == losses
    resumed.train(state, unfinished, steps=9, log_every=3)
    for name in ("train/loss", "train/step_loss"):
        found, wanted = ([row[name] for row in each.rows()] for each in (resumed, unbroken))
        assert found == wanted, name


def test_a_checkpoint_of_an_older_version_has_no_losses():
    assert Unfinished.from_extra({"evaluation_owed": True}) == Unfinished(evaluation=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_ends_the_step_and_saves_what_the_step_gave(tmp_path, number):
    bench = Bench(tmp_path)
    bench.at[3] = lambda: os.kill(os.getpid(), number)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name} after step 3"):
        bench.train(steps=9)
    assert signal.getsignal(number) is before
    abstract = jax.eval_shape(lambda: {"w": jnp.zeros(())})
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    step, params = checkpoints.restore_params(abstract)
    checkpoints.close()
    assert (step, float(params["w"])) == (3, 3.0)


@pytest.mark.parametrize(("step", "pending"), [(1, False), (2, True), (4, True)])
def test_signal_saves_at_once_and_leaves_the_evaluation_pending(tmp_path, step, pending):
    bench = Bench(tmp_path)
    bench.at[step] = lambda: os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match=f"after step {step}"):
        bench.train(steps=4, eval_every=2)
    assert bench.events[-1] == f"step {step}"
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    found, _, extra = checkpoints.restore(jax.eval_shape(first_state))
    checkpoints.close()
    assert (found, extra["loader"]) == (step, {"given": step})
    assert Unfinished.from_extra(extra).evaluation == pending
    assert extra["evaluation_owed"] == pending, "older versions read this name"


def test_pending_evaluation_comes_before_the_next_step(tmp_path):
    bench = Bench(tmp_path)
    bench.train(steps=2, unfinished=Unfinished(evaluation=True))
    assert bench.events == ["evaluate 0", "step 1", "step 2", "evaluate 2"]


def test_first_batch_alone_is_checked_before_its_step(tmp_path):
    bench = Bench(tmp_path)
    bench.train(steps=3)
    assert bench.checked == [0]


def test_state_is_saved_before_it_is_evaluated(tmp_path, monkeypatch):
    bench = Bench(tmp_path, every=2)
    save = Checkpoints.save

    def saving(self: Checkpoints, step: int, *more: Any) -> None:
        bench.events.append(f"save {step}")
        save(self, step, *more)

    monkeypatch.setattr(Checkpoints, "save", saving)
    bench.train(steps=2, eval_every=2)
    assert bench.events == ["step 1", "step 2", "save 2", "evaluate 2"]


def test_second_interrupt_ends_at_once(tmp_path):
    bench = Bench(tmp_path)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    bench.at[2] = twice
    with pytest.raises(KeyboardInterrupt):
        bench.train(steps=9)
    assert bench.checkpoints.latest is None


def test_steps_that_are_not_finite_are_named_and_passed(tmp_path, caplog):
    bench = Bench(tmp_path)
    bench.bad = {2, 3, 5}
    bench.train(steps=6, log_every=1, max_skipped=3)
    assert [row["train/skipped"] for row in bench.rows()] == [0, 1, 2, 2, 3, 3]
    assert [
        record.message.partition(":")[0]
        for record in caplog.records
        if "not finite" in record.message
    ] == [
        "step 2",
        "step 3",
        "step 5",
    ]


def test_too_many_of_them_in_a_row_stop_the_run_and_name_the_batch(tmp_path):
    bench = Bench(tmp_path)
    bench.bad = {2, 4, 5, 6, 7}
    rows = "the batch holds rows 10 to 11 of the order"
    said = rf"^step 6: .* 3 times in a row \(train\.max_skipped\); {rows}\.$"
    with pytest.raises(UserError, match=said):
        bench.train(steps=9, max_skipped=3)
    assert not any(event.startswith("evaluate") for event in bench.events)
    assert bench.rows()[-1]["train/skipped_in_row"] >= 3

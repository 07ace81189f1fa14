"""A run ends where it would have ended, whatever stops it on the way."""

import itertools
import math
import pathlib
import re
import shutil
import signal
import time

import jax
import numpy as np
import pytest

import research
from research.core.errors import UserError
from research.data.sources import SourceConfig, documents
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.recipes import run_parts
from research.recipes import train as train_recipe
from research.recipes.experiment import load_experiment
from research.training.metrics import curve, read_metrics
from tests.recipes import runs
from tests.recipes.fixtures import Unbroken


def test_run_stopped_at_many_steps_ends_bitwise_as_the_unbroken_one(
    tmp_path, unbroken: Unbroken, monkeypatch
):
    seen = runs.record_batches(monkeypatch)
    # A step's row is written while the next one is under way: this stops after 2 steps, after 4
    # (which are evaluated and have a checkpoint), after 7, after 10 and after the last.
    for step in (1, 3, 6, 9, 11):
        runs.run_until(step, unbroken.config, tmp_path / "run")
    state = runs.run(unbroken.config, tmp_path / "run")
    runs.assert_same_state(state, unbroken.state)
    assert seen == unbroken.batches
    assert runs.rows_without_times(tmp_path / "run") == runs.rows_without_times(unbroken.workdir)


@pytest.mark.thorough
def test_another_seed_ends_elsewhere(tmp_path, unbroken: Unbroken):  # the control of the test above
    state = runs.run(unbroken.config, tmp_path / "run", train__seed=1)
    with pytest.raises(AssertionError):
        runs.assert_same_state(state, unbroken.state)


@pytest.mark.thorough
def test_two_runs_of_one_config_are_bitwise_the_same(tmp_path, unbroken: Unbroken):
    runs.assert_same_state(runs.run(unbroken.config, tmp_path / "run"), unbroken.state)


@pytest.mark.thorough
def test_a_run_stopped_between_rows_has_the_rows_of_an_unbroken_one(tmp_path, tiny):
    runs.run(tiny, tmp_path / "unbroken", train__log_every=5)
    # It stops when the row of step 5 is written, which is while step 6 is under way.
    runs.run_until(5, tiny, tmp_path / "resumed", train__log_every=5)
    runs.run(tiny, tmp_path / "resumed", train__log_every=5)
    found, wanted = (runs.rows_without_times(tmp_path / name) for name in ("resumed", "unbroken"))
    assert found == wanted


def test_parts_of_a_pod_s_config_that_do_nothing_here_are_said(tmp_path, tiny, caplog):
    pod = {"train__pipeline__schedule": "gpipe", "mesh__devices": "v5p:2x2x1"}
    with caplog.at_level("WARNING", "tessera"):
        runs.run(tiny, tmp_path / "run", train__steps=2, **pod)
    assert [record.getMessage() for record in caplog.records] == [
        "train.pipeline = 'gpipe' with 1 chunk(s) does nothing: mesh.pipeline = 1 has no stages.",
        "mesh.devices = 'v5p:2x2x1' names others than the 8 of this run, on cpu.",
    ]


def test_utilization_is_of_all_devices_of_the_mesh(tiny, monkeypatch):
    monkeypatch.setattr(run_parts, "peak_flops", lambda kind, dtype: 1e12)
    config = load_experiment(str(tiny), [])
    found = run_parts.throughput(config, make_mesh(MeshConfig(data=4, tensor=2)))
    assert found.peak_flops == 8e12
    assert found.num_devices == 8


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_exits_with_status_75(tmp_path, tiny, number, monkeypatch, capsys):
    runs.at_step(monkeypatch, 6, lambda: signal.raise_signal(number))
    assert runs.command("train", tiny, tmp_path / "run") == 75
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"tessera: stopped by {number.name} ")
    saved = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert saved == 7
    assert f"step {saved}" in last


def wait_for(path: pathlib.Path, process, seconds: float = 400) -> None:
    """Waits until a file or folder is there."""
    until = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.processes
def test_killed_run_repeats_from_the_last_checkpoint_to_the_same_end(tmp_path, unbroken: Unbroken):
    workdir = tmp_path / "run"
    process = runs.spawn("train", f"--config={unbroken.config}", f"--workdir={workdir}")
    wait_for(workdir / "checkpoints" / "4", process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    state = runs.run(unbroken.config, workdir)
    runs.assert_same_state(state, unbroken.state)
    assert runs.rows_without_times(workdir) == runs.rows_without_times(unbroken.workdir)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        # vocab over tensor, embed over fsdp
        ({"mesh__data": 2, "mesh__fsdp": 2, "mesh__tensor": 2}, (384 // 2, 16 // 2)),
        (
            {
                "mesh__pipeline": 2,
                "mesh__context": 2,
                "mesh__tensor": 2,
                "train__pipeline__schedule": "gpipe",
                "model__sequence_parallel": True,
                "model__attention__exchange__kind": "all_gather",
                "model__attention__implementation": "reference",
            },
            # The tokens' axes shard embed too.
            (384 // 2, 16 // 2),
        ),
    ],
)
def test_run_goes_on_on_another_mesh(tmp_path, unbroken: Unbroken, layout: dict, shape: tuple):
    workdir = tmp_path / "run"
    runs.run_until(5, unbroken.config, workdir)
    state = runs.run(unbroken.config, workdir, **layout)
    table = state.params["embed"]["embedding"]
    assert table.addressable_shards[0].data.shape == shape
    for name in ("train/loss", "eval/loss"):
        ours, theirs = (
            curve(read_metrics(workdir), name),
            curve(read_metrics(unbroken.workdir), name),
        )
        assert ours[0] == theirs[0]
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5)


@pytest.mark.thorough
def test_a_run_says_that_its_config_names_other_devices(tmp_path, tiny, caplog):
    for devices, count in (("v5p:2x2x4", 1), ("cpu:8", 0)):
        caplog.clear()
        runs.run(tiny, tmp_path / devices[:3], train__steps=2, mesh__devices=devices)
        assert len([line for line in caplog.messages if "mesh.devices = " in line]) == count


def test_finished_run_stays_as_it_is(tmp_path, unbroken: Unbroken, caplog):
    shutil.copytree(unbroken.workdir, tmp_path / "run")
    before = runs.contents(tmp_path / "run" / "checkpoints")
    with caplog.at_level("INFO", "tessera"):
        state = runs.run(unbroken.config, tmp_path / "run")
    runs.assert_same_state(state, unbroken.state)
    assert runs.contents(tmp_path / "run" / "checkpoints") == before
    assert runs.rows_without_times(tmp_path / "run") == runs.rows_without_times(unbroken.workdir)
    assert "nothing is left to do" in caplog.text
    assert re.search(r"step 12  eval/loss \d+\.\d{4}  eval/bits_per_byte \d+\.\d{4}", caplog.text)


def test_finished_run_goes_on_where_steps_are_added(tmp_path, unbroken: Unbroken):
    shutil.copytree(unbroken.workdir, tmp_path / "run")
    state = runs.run(unbroken.config, tmp_path / "run", train__steps=14)
    assert int(state.step) == 14
    assert [row["step"] for row in read_metrics(tmp_path / "run") if "train/loss" in row] == list(
        range(1, 15)
    )


def damage(checkpoint: pathlib.Path) -> None:
    """Flips a bit of the largest array."""
    largest = max(
        jax.tree.leaves(research.load(checkpoint.parent.parent).params), key=lambda leaf: leaf.size
    )
    raw = np.asarray(largest).tobytes()[:512]  # each device writes a part
    [path] = [path for path in checkpoint.rglob("*") if path.is_file() and raw in path.read_bytes()]
    data = bytearray(path.read_bytes())
    data[data.index(raw) + 100] ^= 1
    path.write_bytes(data)


def test_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, unbroken: Unbroken, caplog):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    damage(workdir / "checkpoints" / "12")
    state = runs.run(unbroken.config, workdir)
    assert f"Damaged checkpoint {workdir / 'checkpoints' / '12'}" in caplog.text
    runs.assert_same_state(state, unbroken.state)
    assert runs.rows_without_times(workdir) == runs.rows_without_times(unbroken.workdir)


def test_run_never_starts_anew_when_all_checkpoints_are_damaged(
    tmp_path, unbroken: Unbroken, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    damage(workdir / "checkpoints" / "12")
    damage(workdir / "checkpoints" / "8")
    before = runs.contents(workdir)
    assert runs.command("train", unbroken.config, workdir, "--config.train.steps=20") == 2
    assert (
        capsys.readouterr()
        .err.splitlines()[-1]
        .startswith("tessera: error: no checkpoint is intact")
    )
    assert runs.contents(workdir) == before


def test_diverged_run_stops_and_names_step_and_batch(tmp_path, tiny, capsys):
    assert runs.command("train", tiny, tmp_path / "run", "--config.optim.learning_rate=1e30") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"step \d+: loss or gradient was not finite 5 times in a row .* rows \d+ to \d+ of", last
    )
    rows = [row for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert max(row["train/skipped_in_row"] for row in rows) >= 5


def poisoned_batches(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Makes the loss of some steps of the next run, which must not evaluate before, not a
    number.
    """
    shard, count = train_recipe.shard_batch, itertools.count(1)

    def placing(batch, like):
        if next(count) in steps:
            batch = {**batch, "weights": batch["weights"] * np.nan}
        return shard(batch, like)

    monkeypatch.setattr(train_recipe, "shard_batch", placing)


def test_step_without_a_finite_loss_is_skipped_and_counted(tmp_path, tiny, monkeypatch, caplog):
    poisoned_batches(monkeypatch, {2, 3})
    state = runs.run(tiny, tmp_path / "run", train__eval_every=0, train__steps=8)
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (8, 2, 0)
    rows = [row for row in read_metrics(tmp_path / "run") if "train/loss" in row]
    assert [row["train/skipped"] for row in rows] == [0, 1, 2, 2, 2, 2, 2, 2]
    assert [math.isnan(row["train/loss"]) for row in rows] == [
        step in (2, 3) for step in range(1, 9)
    ]
    assert "step 2: loss or gradient is not finite" in caplog.text
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


@pytest.mark.thorough
def test_run_whose_steps_are_never_finite_stops_without_harm(tmp_path, tiny, monkeypatch):
    poisoned_batches(monkeypatch, set(range(3, 100)))
    with pytest.raises(
        UserError, match=r"step 7: .* 5 times in a row .* rows 48 to 55 of the order"
    ):
        runs.run(tiny, tmp_path / "run", train__eval_every=0)
    monkeypatch.undo()
    state = runs.run(
        tiny, tmp_path / "run", train__eval_every=0
    )  # the batches were at fault: it goes on behind them
    assert int(state.step) == runs.STEPS
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_workdir_describes_the_run(unbroken: Unbroken):
    for name in (
        "config.json",
        "tokenizer",
        "checkpoints/12",
        "checkpoints/8",
        "metrics.jsonl",
        "tensorboard",
    ):
        assert (unbroken.workdir / name).exists(), name
    assert not (unbroken.workdir / "checkpoints" / "4").exists()
    assert (unbroken.workdir / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert any(path.stat().st_size for path in (unbroken.workdir / "tensorboard").iterdir())
    rows = read_metrics(unbroken.workdir)
    trained = [row for row in rows if "train/loss" in row]
    assert [row["step"] for row in trained] == list(range(1, runs.STEPS + 1))
    assert all(
        "throughput/mfu" in row and row["throughput/tokens_per_second"] > 0 for row in trained
    )
    assert [row["step"] for row in rows if "eval/bits_per_byte" in row] == [4, 8, 12]
    assert trained[-1]["train/loss"] < trained[0]["train/loss"] - 1


def test_bits_per_byte_are_those_computed_by_hand(unbroken: Unbroken):
    model = research.load(unbroken.workdir)
    path = str(unbroken.config.parent / "corpus")
    size, pieces = 0, []
    for document in documents(
        SourceConfig(kind="text", path=path, heldout_fraction=0.2), "heldout"
    ):
        ids = model.tokenizer.frame(np.asarray(model.tokenizer.encode(document.text), np.int32))
        size += len(document.text.encode())
        # As the loader cuts: pieces of at most a row, positions anew in each.
        pieces += [ids[start : start + 33] for start in range(0, len(ids) - 1, 32)]
    rows = np.stack([np.pad(piece, (0, 33 - len(piece)), constant_values=-1) for piece in pieces])
    tokens, targets = (
        np.maximum(rows[:, :-1], 0),
        rows[:, 1:],
    )  # what stands behind a piece, it does not see
    log_p = np.asarray(jax.nn.log_softmax(model.logits(tokens)), np.float64)
    nats = -(
        np.take_along_axis(log_p, np.maximum(targets, 0)[..., None], -1)[..., 0] * (targets >= 0)
    ).sum()
    found = curve(read_metrics(unbroken.workdir), "eval/bits_per_byte")[1][-1]
    assert found == pytest.approx(nats / math.log(2) / size, rel=1e-4)


@pytest.mark.thorough
def test_times_of_a_run_sum_to_its_wall_time(tmp_path, tiny, monkeypatch):
    written: list[float] = []  # when the last row was, which holds the times up to then
    runs.at_step(monkeypatch, 100, lambda: written.append(time.perf_counter()))
    start = time.perf_counter()
    runs.run(tiny, tmp_path / "run", train__steps=100, train__eval_every=50, checkpoint__every=50)
    whole, wall = time.perf_counter() - start, written[0] - start
    row = [row for row in read_metrics(tmp_path / "run") if "time/other" in row][-1]
    spent = {
        name: value
        for name, value in row.items()
        if name.startswith("time/") and name != "time/step_ms"
    }
    assert row["time/other"] < 0.01 * whole
    assert 0.99 * wall <= sum(spent.values()) <= wall


def test_run_killed_before_its_first_checkpoint_says_that_it_starts_anew(
    tmp_path, unbroken: Unbroken, caplog
):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    shutil.rmtree(workdir / "checkpoints")
    runs.run(unbroken.config, workdir, train__steps=12)
    assert f"{workdir} has no checkpoint: starts at step 0" in caplog.messages
    assert runs.rows_without_times(workdir) == runs.rows_without_times(unbroken.workdir)
    caplog.clear()
    runs.run(unbroken.config, tmp_path / "new", train__steps=3)
    assert not any("no checkpoint" in message for message in caplog.messages)


def test_nothing_held_out_is_said_before_the_first_step(tmp_path, tiny):
    with pytest.raises(UserError, match="held out"):
        runs.run(tiny, tmp_path / "run", **{"data__sources__0__heldout_fraction": 0.0})
    assert not (tmp_path / "run").exists()

"""The rows of a run: claims about `training.metrics`."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.training.metrics import MetricsWriter, curve, format_line, memory_in_use, read_metrics


def strict(line: str):
    """Parses JSON as the standard has it, without NaN."""

    def refuse(word: str):
        raise ValueError(word)

    return json.loads(line, parse_constant=refuse)


def write_run(workdir, steps, resumed_step=0):
    writer = MetricsWriter(workdir, resumed_step)
    for step in steps:
        writer.write(step, {"train/loss": 1 / step, "train/tokens": step * 10})
        if step % 5 == 0:
            writer.write(
                step, {"eval/loss": jnp.float32(2 / step), "eval/bits_per_byte": np.float64(0.1)}
            )
    return writer


def test_rows_hold_step_and_exact_numbers(tmp_path):
    write_run(tmp_path, range(1, 6)).close()
    rows = [strict(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[2] == {"step": 3, "train/loss": 1 / 3, "train/tokens": 30}
    assert rows[5] == {"step": 5, "eval/loss": float(np.float32(0.4)), "eval/bits_per_byte": 0.1}
    assert read_metrics(tmp_path) == rows
    assert curve(rows, "eval/loss") == ([5], [float(np.float32(0.4))])


def test_a_row_is_in_the_file_before_the_writer_is_closed(tmp_path):
    writer = write_run(tmp_path, [1])
    assert len(read_metrics(tmp_path)) == 1
    writer.close()


def test_numbers_that_are_not_finite_are_valid_json_and_come_back(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, {"a": jnp.nan, "b": jnp.float32(jnp.inf), "c": -math.inf, "d": None})
    writer.close()
    row = strict((tmp_path / "metrics.jsonl").read_text())
    assert row == {"step": 1, "a": "NaN", "b": "Infinity", "c": "-Infinity", "d": None}
    [back] = read_metrics(tmp_path)
    assert math.isnan(back["a"])
    assert (back["b"], back["c"], back["d"]) == (math.inf, -math.inf, None)


def test_trackers_get_each_row_with_its_step(tmp_path):
    class Rows(list):
        def write(self, step, values):
            self.append((step, dict(values)))

        def close(self):
            raise AssertionError("who opened it closes it")

    rows = Rows()
    with MetricsWriter(tmp_path, trackers=[rows]) as writer:
        writer.write(7, {"train/loss": jnp.float32(0.5), "throughput/mfu": None})
        writer.write(9, {"eval/loss": 0.25})
    assert rows == [(7, {"train/loss": 0.5}), (9, {"eval/loss": 0.25})]


@pytest.mark.parametrize("torn", ["", '{"step": 13, "train/lo'])
def test_a_resumed_run_has_the_rows_of_an_unbroken_one(tmp_path, torn):
    write_run(tmp_path / "unbroken", range(1, 21)).close()
    write_run(tmp_path / "resumed", range(1, 13)).close()
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as file:
        file.write(torn)
    write_run(tmp_path / "resumed", range(11, 21), resumed_step=10).close()
    files = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("unbroken", "resumed")]
    assert files[0] == files[1]
    assert sorted(path.name for path in (tmp_path / "resumed").iterdir()) == [
        "metrics.jsonl",
        "tensorboard",
    ]


def test_without_truncation_a_resumed_run_would_repeat_rows(tmp_path):  # the control
    write_run(tmp_path, range(1, 13)).close()
    write_run(tmp_path, range(11, 21), resumed_step=12).close()
    assert curve(read_metrics(tmp_path), "train/loss")[0].count(11) == 2


def test_tensorboard_gets_the_same_numbers_and_purges_at_resume(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    write_run(tmp_path, range(1, 4)).close()
    write_run(tmp_path, [3], resumed_step=2).close()
    events = []
    for path in sorted(
        (tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns
    ):
        data = path.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            events.append(Event.FromString(data[12 : 12 + length]))
            data = data[16 + length :]
    scalars = [
        (e.step, v.tag, v.simple_value)
        for e in events
        for v in e.summary.value
        if v.tag == "train/loss"
    ]
    assert [step for step, _, _ in scalars] == [1, 2, 3, 3]
    assert scalars[1][2] == pytest.approx(0.5)
    assert [e.step for e in events if e.session_log.status == 1 and e.step] == [1, 3]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = write_run(tmp_path / "run", [1])
    writer.close()
    assert not (tmp_path / "run").exists()


def test_a_workdir_without_metrics_has_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []


ROW = {
    "train/loss": 3.14159,
    "train/grad_norm": 0.5,
    "train/learning_rate": 3e-4,
    "throughput/tokens_per_second": 2048.0,
    "throughput/tokens_per_second_per_device": 256.0,
    "throughput/mfu": 0.256,
    "time/step_ms": 500.0,
}


def devices_that_hold(monkeypatch, *peaks: int) -> None:
    class Device:
        def __init__(self, peak: int):
            self.peak = peak

        def memory_stats(self) -> dict[str, int]:
            return {"bytes_in_use": 1, "peak_bytes_in_use": self.peak}

    monkeypatch.setattr(jax, "local_devices", lambda: [Device(peak) for peak in peaks])


def test_the_log_line_holds_the_fields_of_the_design_in_order(monkeypatch):
    devices_that_hold(monkeypatch, 2**20, 3 * 2**29)
    assert format_line(7, 1000, ROW) == (
        "step    7/1000  loss 3.1416  grad_norm 0.500  lr 3.000e-04  tokens/s 2,048  "
        "tokens/s/device 256  "
        "mfu 25.6% (causal half)  memory 1.50 GiB (device)  step_ms 500.0  eta 0:08:16"
    )


def test_the_log_line_says_so_where_the_peak_is_unknown_and_memory_is_the_process(monkeypatch):
    monkeypatch.setattr("research.training.metrics.memory_in_use", lambda: (2**30, "process"))
    line = format_line(7, 1000, ROW | {"throughput/mfu": None})
    assert "mfu unknown" in line
    assert "memory 1.00 GiB (process)" in line


def test_memory_is_the_processs_where_devices_do_not_tell(monkeypatch):
    held, whose = memory_in_use()
    assert whose == "process"
    assert held > 50e6
    devices_that_hold(monkeypatch, 5, 7)
    assert memory_in_use() == (7, "device")


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 3, "train/loss": ' + b"9" * 5000 + b"}",
        b'{"step": 3, "train/loss": ' + b"[" * 200_000 + b"}",
        b'{"step": 3, "train/loss": "N\xffN"}',
        b'{"step": "3", "train/loss": 1}',
        b'{"step": 3, "train/loss": [1]}',
        b"[3]",
    ],
)
def test_a_line_that_is_no_row_is_left_out_and_dropped_at_resume(tmp_path, line):
    good = [b'{"step": 2, "train/loss": 1.0}', b'{"step": 4, "train/loss": "NaN"}']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join([good[0], line, good[1], b""]))
    assert [row["step"] for row in read_metrics(tmp_path)] == [2, 4]
    MetricsWriter(tmp_path, 4).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b"\n".join([*good, b""])

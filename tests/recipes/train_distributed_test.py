"""Two real processes train as one does, and stop together."""

import pathlib
import signal
import socket
import subprocess
import time

import numpy as np
import pytest

from research.training.metrics import curve, read_metrics
from tests.recipes import runs

SCHEDULE = {"optim.schedule.name": "constant", "train.eval_every": 0}


def start(
    config: pathlib.Path, workdir: pathlib.Path, steps: int, tensor: int = 1
) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    changes = {"train.steps": steps, "distributed.coordinator": f"localhost:{port}", **SCHEDULE}
    changes |= {
        "distributed.initialize": True,
        "distributed.num_processes": 2,
        "mesh.tensor": tensor,
    }
    arguments = ["train", f"--config={config}", f"--workdir={workdir}", *runs.flags(changes)]
    return [
        runs.spawn(*arguments, f"--config.distributed.process_id={i}", devices=1) for i in range(2)
    ]


def finish(processes: list[subprocess.Popen[str]]) -> tuple[list[int], list[str]]:
    said = [process.communicate(timeout=400)[1].splitlines() for process in processes]
    last = [
        lines[-1] if lines else "" for lines in said
    ]  # where all goes well only process 0 speaks
    return [process.returncode for process in processes], last


@pytest.mark.processes
def test_two_processes_stop_together_and_end_as_one_process_does(tiny: pathlib.Path, tmp_path):
    workdir = tmp_path / "two"
    processes = start(tiny, workdir, 100_000)
    until = time.monotonic() + 120
    while not (
        workdir / "config.json"
    ).exists():  # it compiles now: the notice waits for the first steps
        assert all(process.poll() is None for process in processes)
        assert time.monotonic() < until
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    status, last = finish(processes)
    assert status == [75, 75], last
    assert last[0] == last[1]
    stopped = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
    assert f"after step {stopped};" in last[0]

    # It goes on with both processes in one part of the batch: each must read all rows.
    status, last = finish(start(tiny, workdir, stopped + 3, tensor=2))
    assert status == [0, 0], last
    changes = {name.replace(".", "__"): value for name, value in SCHEDULE.items()}
    runs.run(tiny, tmp_path / "one", train__steps=stopped + 3, **changes)
    for name in ("train/loss", "eval/loss"):
        ours, theirs = (
            curve(read_metrics(workdir), name),
            curve(read_metrics(tmp_path / "one"), name),
        )
        assert ours[0] == theirs[0]
        np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5)

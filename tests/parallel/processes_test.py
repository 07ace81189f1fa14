"""Several real processes give the run of one device, with every mesh axis across them."""

import json
import os
import pathlib
import pickle
import socket
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

from research.parallel.mesh import make_mesh
from research.recipes.train import train as train_verb
from research.training.metrics import curve, read_metrics
from tests.parallel.process_cases import CASES, DEVICES, STEPS, Case, alone, experiment, named
from tests.recipes import runs

FURTHER = ("columns", "tessera train", "different configs")
ALL = [
    *(named(case) for case in CASES),
    *(f"{count} processes: {name}" for count in (2, 4) for name in FURTHER),
]


def run_together(count: int, folder: pathlib.Path) -> list[str]:
    """Runs all cases of a number of processes, and returns what each process said."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The last flag of a name counts; the others stay, since another compilation may give other
    # bits.
    devices = f" --xla_force_host_platform_device_count={DEVICES // count}"
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + devices,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        # A collective between processes blocks a thread of XLA's pool. With as few threads as cores
        # those that it waits for might find none.
        "NPROC": "16",
        "PYTHONPATH": str(runs.ROOT),
    }
    module = "tests.parallel.process_cases"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, str(index), str(count), str(port), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for index in range(count)
    ]
    try:
        return [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def pods(tiny: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of what 4 processes, and then 2, have done."""
    folder = tmp_path_factory.mktemp("pods")
    (folder / "tiny.py").write_text(tiny.read_text())
    expected: dict[str, Any] = {}
    for case in CASES:
        expected[case.model, case.microbatches] = alone(case.model, case.microbatches)
    (folder / "expected.pickle").write_bytes(pickle.dumps(expected))
    for count in (4, 2):
        for index, said in enumerate(run_together(count, folder)):
            (folder / f"said-{count}-{index}.txt").write_text(said)
    return folder


@pytest.mark.processes
@pytest.mark.parametrize("name", ALL)
def test_several_processes_do_what_one_device_does(pods: pathlib.Path, name: str):
    count = int(name.partition(" ")[0])
    for index in range(count):
        said = (pods / f"said-{count}-{index}.txt").read_text()
        path = pods / f"results-{count}-{index}.json"
        assert path.exists(), said
        results = json.loads(path.read_text())
        assert name in results, said
        assert results[name] is None, f"process {index}: {results[name]}"


@pytest.mark.processes
def test_a_run_is_handed_from_4_processes_to_2_and_to_1(pods: pathlib.Path):
    train_verb(experiment(pods, STEPS[1]), pods / "run")
    train_verb(experiment(pods, STEPS[1]), pods / "alone")
    for name in ("train/loss", "eval/loss"):
        steps, values = curve(read_metrics(pods / "run"), name)
        alone_steps, expected = curve(read_metrics(pods / "alone"), name)
        wanted = [expected[list(alone_steps).index(step)] for step in steps if step in alone_steps]
        found = [value for step, value in zip(steps, values, strict=True) if step in alone_steps]
        assert len(found) == len(alone_steps)
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def crossing(case: Case) -> set[str]:
    """The axes along which neighbours are in different processes."""
    mesh = make_mesh(case.mesh)
    each = DEVICES // case.processes
    process = np.vectorize(lambda device: device.id // each)(mesh.devices)
    return {
        axis for index, axis in enumerate(mesh.axis_names) if np.diff(process, axis=index).any()
    }


@pytest.mark.parametrize("count", [2, 4])
def test_every_axis_is_across_processes_in_some_case(count: int):
    cases = [case for case in CASES if case.processes == count]
    assert [set(case.crosses) for case in cases] == [crossing(case) for case in cases]
    axes = {axis for case in cases for axis in case.crosses}
    assert axes == {"data", "fsdp", "pipeline", "context", "expert", "tensor"}

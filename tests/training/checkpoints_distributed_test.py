"""Checkpoints of a run over several processes, and one process in trouble."""

import os
import pathlib
import socket
import subprocess
import sys

import jax
import pytest

from research.training.checkpoints import CheckpointConfig, Checkpoints
from tests.training.states import abstract, assert_same, new_state

# What each of two processes, with two devices each, does.
PROGRAM = """
import pathlib, sys
import jax
index, port, workdir = int(sys.argv[1]), sys.argv[2], pathlib.Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
import jax.numpy as jnp
from research.training import checkpoint_files
from research.training.checkpoints import CheckpointConfig, Checkpoints
from tests.training.states import abstract, new_state, shardings

mesh = jax.make_mesh((4,), ("data",))
places = shardings(jax.eval_shape(new_state), mesh, ("data",))
state = jax.jit(new_state, out_shardings=places)()
checkpoints = Checkpoints(workdir, CheckpointConfig(every=1, keep=2))
for step in (1, 2, 3):
    checkpoints.save(step, state, {"step": step})
checkpoints.wait()

other = jax.make_mesh((2, 2), ("data", "tensor"))
step, restored, extra = checkpoints.restore(abstract(state, other, ("tensor",)))
assert (step, extra) == (3, {"step": 3})
same = jax.jit(lambda a, b: jax.tree.map(lambda x, y: jnp.all(x == y), a, b))
back = jax.device_put(restored, places)
assert all(bool(x) for x in jax.tree.leaves(same(state, back)))

if index == 1:  # this process alone cannot read the newest one
    read = checkpoint_files.read_arrays
    def broken(folder, manifest, wanted):
        if folder.name == "3":
            raise checkpoint_files.Damaged("array params/embed cannot be read (test)")
        return read(folder, manifest, wanted)
    checkpoint_files.read_arrays = broken
step, _, _ = checkpoints.restore(abstract(state, mesh, ("data",)))
assert step == 2, step
checkpoints.close()
print("done", flush=True)
"""


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> pathlib.Path:
    """A workdir that two processes have written and read."""
    folder = tmp_path_factory.mktemp("pod")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The last flag of a name counts; the others stay, since another compilation may give other
    # bits.
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(index), str(port), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        said = [run.communicate(timeout=400)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()
    assert all(run.returncode == 0 for run in runs), "\n".join(said)
    return folder


@pytest.mark.processes
def test_processes_agree_and_one_process_reads_what_two_have_written(workdir):
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    state = jax.jit(new_state)()
    step, restored, extra = checkpoints.restore(abstract(state))
    assert (step, extra) == (3, {"step": 3})
    assert checkpoints.steps() == [2, 3]
    assert_same(restored, state)

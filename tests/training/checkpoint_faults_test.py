"""A write that fails or is cut short leaves the earlier checkpoints whole."""

import asyncio
import errno
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time
import weakref

import jax.numpy as jnp
import pytest
from orbax.checkpoint._src.path import async_path
from orbax.checkpoint._src.serialization import serialization

from research.core.errors import UserError
from research.training import checkpoint_faults
from tests.training.states import abstract, assert_same, new_state, write

FULL = OSError(28, "No space left on device")


def test_a_full_disk_is_one_line_and_earlier_checkpoints_are_whole(opened, tmp_path, monkeypatch):
    state, checkpoints = new_state(), opened()
    checkpoints.save(1, state, {})
    checkpoints.wait()

    def full(*args: object) -> None:
        raise FULL

    monkeypatch.setattr(checkpoints._checkpointer._handler, "finalize", full)
    checkpoints.save(2, state, {})
    with pytest.raises(
        UserError, match=r"checkpoints/2: No space left on device; it was not written"
    ) as error:
        checkpoints.save(3, state, {})
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("Earlier checkpoints are intact.")
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    assert checkpoints.restore(abstract(state))[0] == 1


def test_a_full_disk_at_the_first_checkpoint_promises_none_before(opened, monkeypatch):
    state, checkpoints = new_state(), opened()

    def full(*args: object) -> None:
        raise FULL

    monkeypatch.setattr(checkpoints._checkpointer._handler, "finalize", full)
    checkpoints.save(1, state, {})
    with pytest.raises(
        UserError,
        match=r"checkpoints/1: No space .* not written\. There is no earlier checkpoint\.$",
    ):
        checkpoints.wait()


def test_what_fails_of_other_arrays_is_not_reported_beside_the_line(opened, monkeypatch, caplog):
    """Tasks report an error that nobody asked for when they are freed: that is to happen before
    `close` returns.
    """
    checkpoints, others = opened(), weakref.WeakSet()

    async def full() -> None:
        raise ValueError(
            "Error writing 1.orbax-checkpoint-tmp: No space left on device"
        )  # as TensorStore says it

    async def full_in_its_tasks() -> None:
        held = [asyncio.ensure_future(full()) for _ in range(2)]
        others.update(held)
        await asyncio.wait(held)
        await full()

    async def full_as_others_are(*args: object, **options: object) -> None:
        try:
            await full_in_its_tasks()
        except ValueError as error:
            raise RuntimeError("the writer stopped") from error

    monkeypatch.setattr(serialization, "async_serialize_from_host", full_as_others_are)
    checkpoints.save(1, new_state(), {})
    with pytest.raises(UserError, match="No space left on device") as caught:
        checkpoints.wait()
    checkpoints.close()
    assert caught.value.__cause__ is not None  # as in a program that is about to print its line
    assert not others
    assert not caplog.messages


@pytest.mark.parametrize("part", ["", "arrays", "manifest"])
def test_a_disk_without_room_for_a_folder_lets_the_process_end(opened, part, monkeypatch):
    checkpoints, before = opened(), set(threading.enumerate())
    write(checkpoints, 1, new_state())

    mkdir = async_path.mkdir

    async def full(path: pathlib.Path, *args: object, **options: object) -> None:
        if path.name.startswith(part):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        await mkdir(path, *args, **options)

    monkeypatch.setattr(async_path, "mkdir", full)
    with pytest.raises(
        UserError, match=r"checkpoints/2: No space left on device; it was not written"
    ):
        write(checkpoints, 2, new_state())
    checkpoints.close()
    assert not [
        thread for thread in threading.enumerate() if thread not in before and not thread.daemon
    ]


def test_errors_that_name_each_other_are_told_once():
    first, second = OSError("first"), OSError("second")
    first.__context__, second.__cause__ = second, first
    assert [str(error) for error in checkpoint_faults._chain(first)] == ["first", "second"]


def test_another_error_of_the_writer_is_raised_at_the_next_wait(opened, monkeypatch):
    state, checkpoints = new_state(), opened()

    def broken(*args: object) -> None:
        raise RuntimeError("the writer broke")

    monkeypatch.setattr(checkpoints._checkpointer._handler, "finalize", broken)
    checkpoints.save(1, state, {})
    with pytest.raises(RuntimeError, match="the writer broke"):
        checkpoints.wait()
    monkeypatch.undo()
    assert checkpoints.latest is None
    checkpoints.save(1, state, {})
    assert checkpoints.restore(abstract(state))[0] == 1


@pytest.mark.filterwarnings(
    "error::pytest.PytestUnraisableExceptionWarning"
)  # not a traceback beside the line
def test_a_really_full_disk_leaves_earlier_checkpoints_whole(opened, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", small], capture_output=True
    )
    if mount.returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        state = new_state().replace(
            params={"w": jnp.arange(2**20, dtype=jnp.float32)}, opt_state=()
        )
        checkpoints = opened(small, keep=5)
        checkpoints.save(1, state, {})
        checkpoints.wait()

        def save_two_more() -> None:
            for step in (2, 3):
                checkpoints.save(step, state, {})
                checkpoints.wait()

        with pytest.raises(UserError, match=r"checkpoints/[23]: No space left on device"):
            save_two_more()
        assert all(name.isdecimal() for name in os.listdir(small / "checkpoints"))
        step, restored, _ = checkpoints.restore(abstract(state))
        assert step == checkpoints.latest
        assert_same(restored.params, state.params)
    finally:
        subprocess.run(["umount", "-l", small], check=True)


TRAIN = """
import pathlib, sys
import jax, jax.numpy as jnp
from research.training.checkpoints import CheckpointConfig, Checkpoints
layers = {f"layers_{i}": {"w": jnp.zeros(4096)} for i in range(4)}
state = {"step": jnp.int32(0), "w": jnp.zeros((512, 1024)), "m": layers}
train = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), CheckpointConfig(every=1, keep=2))
if checkpoints.latest is not None:
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )
    step, state, extra = checkpoints.restore(shapes)
    assert all(bool(jnp.all(leaf == step)) for leaf in jax.tree.leaves(state)), "restored a mixture"
    assert extra == {"step": step}
    print("restored", step, flush=True)
for step in range(int(state["step"]) + 1, 100_000):
    state = train(state)
    checkpoints.save(step, state, {"step": step})
    print("saved", step, flush=True)
"""


@pytest.mark.processes
def test_a_run_killed_at_any_moment_goes_on_from_a_whole_checkpoint(tmp_path):
    rng, reached = random.Random(0), 0
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    for attempt in range(4):
        run = subprocess.Popen(
            [sys.executable, "-c", TRAIN, str(tmp_path)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        first = run.stdout.readline().split()
        assert first, "the run failed"
        if attempt:
            assert first[0] == "restored"
            assert (
                int(first[1]) >= reached - 2
            )  # the one in flight, and the one that the pipe told of before its end
        for _ in range(3):  # whatever the machine, four attempts reach a dozen
            first = run.stdout.readline().split()
        time.sleep(rng.random())
        run.send_signal(signal.SIGKILL)
        said = run.stdout.read().split()
        run.wait()
        reached = int(said[-1]) if len(said) > 1 and said[-1].isdecimal() else int(first[1])
        names = [path.name.partition(".")[2] for path in (tmp_path / "checkpoints").iterdir()]
        assert all(
            name in ("", "deleted") or name.startswith("orbax-checkpoint-tmp") for name in names
        )
    assert reached > 10

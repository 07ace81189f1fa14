"""Nothing is lost: claims about `training.checkpoints`."""

import pathlib
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.training.checkpoints import CheckpointConfig
from tests.training.states import abstract, assert_same, new_state, on_mesh


@pytest.mark.parametrize("asynchronous", [True, False])
def test_restored_state_and_extra_are_bitwise_those_saved(opened, asynchronous):
    state, extra = new_state(ema=True), {"loader": [1, 2], "loss": 0.1, "none": None}
    checkpoints = opened(asynchronous=asynchronous)
    assert checkpoints.latest is None
    checkpoints.save(3, state, extra)
    assert asynchronous or checkpoints.steps() == [3]
    step, restored, found = (
        opened().restore(abstract(state))
        if not asynchronous
        else checkpoints.restore(abstract(state))
    )
    assert (step, found) == (3, extra)
    assert checkpoints.latest == 3
    assert_same(restored, state)


def test_a_state_donated_while_it_is_written_is_saved_as_it_was(opened):
    state = new_state().replace(
        params={"w": jnp.arange(2**20, dtype=jnp.float32)}, opt_state=(), ema=None
    )
    train = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    checkpoints = opened(keep=4)
    for step in range(1, 4):
        checkpoints.save(step, state, {})
        for _ in range(5):
            state = train(state)
    for step in range(1, 4):
        _, restored, _ = checkpoints.restore(abstract(state), step)
        np.testing.assert_array_equal(
            restored.params["w"], np.arange(2**20, dtype=np.float32) + 5 * (step - 1)
        )


def test_training_goes_on_while_one_write_is_in_flight_and_no_more(opened, monkeypatch):
    state, checkpoints = new_state(), opened()
    handler, release = checkpoints._checkpointer._handler, threading.Event()
    finalize = handler.finalize

    def held(folder: object) -> None:
        release.wait(20)
        finalize(folder)

    monkeypatch.setattr(handler, "finalize", held)
    checkpoints.save(1, state, {})
    assert checkpoints.steps() == []  # save has returned, the write has not ended
    threading.Timer(0.3, release.set).start()
    start = time.monotonic()
    checkpoints.save(2, state, {})
    assert time.monotonic() - start >= 0.25
    assert 1 in checkpoints.steps()
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2]


def test_the_latest_and_every_kth_are_kept(opened, tmp_path):
    state, checkpoints = new_state(), opened(every=1, keep=2, keep_every=4)
    for step in range(1, 11):
        checkpoints.save(step, state, {})
    checkpoints.wait()
    assert checkpoints.steps() == [4, 8, 9, 10]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "10",
        "4",
        "8",
        "9",
    ]


def test_an_old_checkpoint_that_cannot_be_removed_is_a_warning(opened, tmp_path, caplog):
    state, checkpoints = new_state(), opened(every=1, keep=1)
    (tmp_path / "checkpoints" / "1.deleted" / "file").mkdir(
        parents=True
    )  # in the way of the first one's new name
    checkpoints._tidied = True
    for step in (1, 2, 3):
        checkpoints.save(step, state, {})
    checkpoints.wait()
    assert "Checkpoint 1 is no longer needed, but cannot be removed" in caplog.text
    assert checkpoints.steps() == [1, 3]


def test_due_is_every_nth_step(opened):
    checkpoints = opened(every=3)
    assert [step for step in range(1, 10) if checkpoints.due(step)] == [3, 6, 9]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"every": 0}, "every = 0 must"),
        ({"keep": 0}, "keep = 0 must"),
        ({"every": 10, "keep_every": 15}, "keep_every = 15 must be a multiple of every = 10"),
    ],
)
def test_impossible_configs_are_errors(fields, said):
    with pytest.raises(UserError, match=said):
        CheckpointConfig(**fields)


def test_a_checkpoint_restores_on_another_mesh(opened):
    eight = jax.make_mesh((8,), ("data",))
    two_by_four = jax.make_mesh((2, 4), ("data", "tensor"))
    state = on_mesh(new_state(), eight, ("data",))
    checkpoints = opened()
    checkpoints.save(1, state, {})
    wanted = abstract(state, two_by_four, ("tensor",))
    _, restored, _ = checkpoints.restore(wanted)
    assert_same(restored, state)
    for found, shape in zip(jax.tree.leaves(restored), jax.tree.leaves(wanted), strict=True):
        assert found.sharding.is_equivalent_to(shape.sharding, found.ndim)


@pytest.mark.parametrize("scanned", [True, False])
def test_scanned_and_unrolled_states_restore_into_each_other(opened, scanned):
    checkpoints = opened()
    checkpoints.save(1, new_state(scanned=scanned), {})
    other = new_state(scanned=not scanned)
    _, restored, _ = checkpoints.restore(abstract(other))
    assert_same(restored, other)


@pytest.mark.parametrize("scanned", [True, False])
def test_parameters_alone_restore_without_the_optimizer(opened, tmp_path, scanned):
    state = new_state()
    checkpoints = opened()
    checkpoints.save(1, state, {})
    checkpoints.wait()
    raw = np.asarray(
        jnp.stack([state.opt_state[0].nu[f"layers_{i}"]["mlp"]["kernel"] for i in range(3)])
    ).tobytes()
    [path] = [path for path in tmp_path.rglob("*") if path.is_file() and raw in path.read_bytes()]
    path.write_bytes(path.read_bytes().replace(raw, bytes(len(raw))))
    like = new_state(scanned=scanned).params
    step, params = opened().restore_params(abstract(like))
    assert step == 1
    assert_same(params, like)
    with pytest.raises(
        UserError, match="opt_state/0/nu/layers/mlp/kernel"
    ):  # the control: it was damaged
        opened().restore(abstract(state))


@pytest.mark.parametrize("ema", [True, False])
def test_averaged_parameters_are_preferred_where_there_are_any(opened, ema):
    state = new_state(ema=ema)
    checkpoints = opened()
    checkpoints.save(1, state, {})
    _, params = checkpoints.restore_params(abstract(state.params), fields=("ema", "params"))
    assert_same(params, state.ema if ema else state.params)


def test_without_a_checkpoint_restoring_is_an_error(opened, tmp_path):
    state = new_state()
    with pytest.raises(UserError, match="checkpoints has no checkpoint"):
        opened().restore(abstract(state))
    checkpoints = opened()
    checkpoints.save(1, state, {})
    with pytest.raises(UserError, match="has no checkpoint of step 2"):
        checkpoints.restore(abstract(state), step=2)


def test_reading_changes_nothing_on_disk(opened, tmp_path):
    state, writer = new_state(), opened()
    writer.save(1, state, {})
    writer.wait()
    (tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp-0").mkdir()
    (tmp_path / "checkpoints" / "0.deleted").mkdir()
    before = sorted(tmp_path.rglob("*"))
    opened().restore(abstract(state))
    assert sorted(tmp_path.rglob("*")) == before
    opened().save(2, state, {})
    opened().wait()


def test_a_run_that_went_back_behind_a_damaged_checkpoint_goes_on_from_there(opened, tmp_path):
    state, writer = new_state(), opened(keep=1, keep_every=None)
    writer.save(1000, state, {"n": 1})
    writer.wait()
    shutil.copytree(tmp_path / "checkpoints" / "1000", tmp_path / "checkpoints" / "3000")
    (tmp_path / "checkpoints" / "3000" / "manifest" / "manifest.json").unlink()
    again = opened(keep=1)
    assert again.restore(abstract(state))[0] == 1000
    again.save(2000, state, {"n": 2})
    again.wait()
    assert again.steps() == [2000]
    assert (tmp_path / "checkpoints" / "3000.set-aside").is_dir()
    again.save(3000, state, {"n": 3})
    assert opened().restore(abstract(state))[2] in ({"n": 2}, {"n": 3})
    again.wait()
    assert again.restore(abstract(state))[2] == {"n": 3}


@pytest.mark.parametrize("name", ["9999999999", "2147483648", "007", "٣", "9" * 200])
def test_a_folder_that_no_step_is_called_is_passed_over_and_said(opened, tmp_path, caplog, name):
    state, writer = new_state(), opened()
    writer.save(10, state, {"n": 1})
    writer.wait()
    shutil.copytree(tmp_path / "checkpoints" / "10", tmp_path / "checkpoints" / name)
    checkpoints = opened()
    assert checkpoints.latest == 10
    assert checkpoints.restore(abstract(state))[0] == 10
    assert caplog.text.count(f"checkpoints/{name} is ignored: no step has this name.") == 1
    checkpoints.save(20, state, {"n": 2})
    checkpoints.wait()
    assert checkpoints.steps() == [10, 20]
    assert (tmp_path / "checkpoints" / name).is_dir()


def test_exchanged_folders_are_no_checkpoints(opened, tmp_path):
    state, writer = new_state(), opened(keep=3)
    for step in (20, 25, 30):
        writer.save(step, state, {"n": step})
    writer.wait()
    folder = tmp_path / "checkpoints"
    for old, new in (("25", "x"), ("30", "25"), ("x", "30")):
        (folder / old).rename(folder / new)
    checkpoints = opened(keep=3)
    step, _, extra = checkpoints.restore(abstract(state))
    assert (step, extra) == (20, {"n": 20})
    with pytest.raises(
        UserError,
        match=r"checkpoints/30: manifest\.json is of step 25: the folder has been renamed",
    ):
        checkpoints.restore(abstract(state), step=30)
    for step in (25, 30):
        checkpoints.save(step, state, {"n": step})
    assert opened().restore(abstract(state))[0] in (25, 30)


def hostile_folder(path: pathlib.Path) -> None:
    path.unlink()
    (path / "below").mkdir(parents=True)


def hostile_loop(path: pathlib.Path) -> None:
    path.unlink()
    path.symlink_to(path)


HOSTILE = {
    "a folder": hostile_folder,
    "a loop of links": hostile_loop,
    "deep JSON": lambda path: path.write_text("[" * 200_000 + "]" * 200_000),
    "a long number": lambda path: path.write_text("9" * 5000),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "other JSON": lambda path: path.write_text('{"sha256": 1, "content": []}'),
}


@pytest.mark.parametrize("file", ["manifest/manifest.json", "arrays/_METADATA", ""])
@pytest.mark.parametrize("harm", HOSTILE)
def test_a_hostile_file_in_a_checkpoint_is_passed_over_and_said(
    opened, tmp_path, caplog, harm, file
):
    state, writer = new_state(), opened()
    for step in (10, 20):
        writer.save(step, state, {"n": step})
    writer.wait()
    path = tmp_path / "checkpoints" / "20" / file
    if not file:  # the checkpoint itself is what it should not be
        shutil.rmtree(path)
        path = tmp_path / "checkpoints" / "20"
        path.write_text("")
    HOSTILE[harm](path)
    checkpoints = opened()
    step, restored, extra = checkpoints.restore(abstract(state))
    assert (step, extra) == (10, {"n": 10})
    assert_same(restored, state)
    assert f"Damaged checkpoint {tmp_path / 'checkpoints' / '20'}: " in caplog.text
    checkpoints.save(20, state, {"n": 21})
    checkpoints.wait()
    assert checkpoints.restore(abstract(state))[2] == {"n": 21}


def test_a_fresh_run_does_not_write_below_the_checkpoints_of_another(opened):
    state, writer = new_state(), opened()
    writer.save(10, state, {"first": True})
    writer.wait()
    other = opened()
    with pytest.raises(
        UserError, match="checkpoints/10 is newer than step 5: restore it, or move it away"
    ):
        other.save(5, state, {})
    other.save(10, state, {"first": False})
    assert other.restore(abstract(state))[2] == {"first": True}

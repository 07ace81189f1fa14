"""A workdir that is deleted, or a disk that cannot be written any more, ends a run in one line."""

import concurrent.futures
import errno
import io
import os
import pathlib
import shutil

import pytest

from research.core.errors import UserError
from research.training.checkpoints import CheckpointConfig, Checkpoints
from research.training.metrics import MetricsWriter, read_metrics
from research.training.presence import Presence
from tests.training.states import new_state

GONE = (
    r"^workdir = .*/run was deleted while the run trained \({} is gone\): "
    r"nothing more is written there\.$"
)


@pytest.fixture
def workdir(tmp_path) -> pathlib.Path:
    """A folder that describes itself, as that of a run does."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_file_that_was_never_there_is_not_missed(tmp_path):
    presence = Presence(tmp_path, "config.json")
    presence.check()
    (tmp_path / "config.json").write_text("{}")
    presence.check()
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match=r"\(config\.json is gone\)"):
        presence.check()


def test_a_deleted_workdir_is_missed_by_the_metrics_and_stays_deleted(workdir):
    writer = MetricsWriter(workdir)
    writer.write(1, {"train/loss": 1.0})
    shutil.rmtree(workdir)
    for act in (lambda: writer.write(2, {"train/loss": 1.0}), writer.flush):
        with pytest.raises(UserError, match=GONE.format(r"metrics\.jsonl")):
            act()
    writer.close()
    assert not workdir.exists()


class Unwritable(io.FileIO):
    """A file whose disk has become read-only since it was opened."""

    def write(self, data: bytes) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_metrics_on_a_disk_that_became_read_only_are_one_line(workdir, caplog):
    writer = MetricsWriter(workdir)
    writer.write(1, {"train/loss": 1.0})
    writer._file.close()
    writer._file = io.TextIOWrapper(io.BufferedWriter(Unwritable(workdir / "metrics.jsonl", "a")))
    with pytest.raises(
        UserError, match=r"run/metrics\.jsonl cannot be written: Read-only file system\.$"
    ):
        writer.write(2, {"train/loss": 1.0})
    writer.close()
    assert not caplog.messages
    assert [row["step"] for row in read_metrics(workdir)] == [1]


def test_a_workdir_deleted_between_two_checkpoints_is_not_made_again(workdir):
    state, checkpoints = new_state(), Checkpoints(workdir, CheckpointConfig())
    checkpoints.save(1, state, {})
    checkpoints.wait()
    shutil.rmtree(workdir)
    with pytest.raises(UserError, match=GONE.format(r"config\.json")):
        checkpoints.save(2, state, {})
    checkpoints.close()
    assert not workdir.exists()


@pytest.mark.parametrize("made_again", [False, True])
def test_a_workdir_deleted_while_a_checkpoint_is_written_is_not_made_again(
    workdir, made_again, monkeypatch, capfd
):
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    finalize = checkpoints._checkpointer._handler.finalize

    def delete(folder: pathlib.Path) -> None:
        shutil.rmtree(workdir, ignore_errors=True)
        if made_again:  # TensorStore makes folders that are missing
            pathlib.Path(folder, "arrays").mkdir(parents=True)
        finalize(folder)

    monkeypatch.setattr(checkpoints._checkpointer._handler, "finalize", delete)
    checkpoints.save(1, new_state(), {})
    with pytest.raises(UserError, match=GONE.format(r"config\.json")):
        checkpoints.wait()
    checkpoints.close()
    assert not workdir.exists()
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("further_errors", [0, 2])
def test_checkpoints_deleted_while_one_is_written_are_named(workdir, further_errors, monkeypatch):
    checkpoints = Checkpoints(workdir, CheckpointConfig())
    finalize = checkpoints._checkpointer._handler.finalize

    def delete(folder: pathlib.Path) -> None:
        shutil.rmtree(workdir / "checkpoints", ignore_errors=True)
        for _ in range(
            further_errors
        ):  # Orbax writes its metadata in another thread, which may fail as well
            failed = concurrent.futures.Future()
            failed.set_exception(FileNotFoundError(folder))
            checkpoints._checkpointer._metadata_store._write_futures.append(failed)
        finalize(folder)

    monkeypatch.setattr(checkpoints._checkpointer._handler, "finalize", delete)
    checkpoints.save(1, new_state(), {})
    with pytest.raises(
        UserError, match=r"/run/checkpoints was deleted while checkpoint 1 was written\.$"
    ):
        checkpoints.wait()
    checkpoints.close()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EIO])
@pytest.mark.parametrize("place", ["save", "finalize"])
def test_a_checkpoint_on_a_disk_that_cannot_be_written_any_more_is_one_line(
    workdir, number, place, monkeypatch
):
    state, checkpoints = new_state(), Checkpoints(workdir, CheckpointConfig())
    checkpoints.save(1, state, {})
    checkpoints.wait()

    def unwritable(*args: object, **options: object) -> None:
        raise RuntimeError("the writer stopped") from OSError(number, os.strerror(number))

    owner = checkpoints._checkpointer if place == "save" else checkpoints._checkpointer._handler
    monkeypatch.setattr(owner, place, unwritable)

    def save_another() -> None:
        checkpoints.save(2, state, {})
        checkpoints.wait()

    cause = os.strerror(number)
    said = rf"checkpoints/2: {cause}; it was not written\. Earlier checkpoints are intact\.$"
    with pytest.raises(UserError, match=said):
        save_another()
    checkpoints.close()
    assert checkpoints.steps() == [1]

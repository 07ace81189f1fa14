"""A run whose workdir or disk is taken away ends in one line with status 2, and makes nothing
anew.
"""

import errno
import os
import pathlib
import shutil

import pytest

from research.training.checkpoints import Checkpoints
from research.training.metrics import MetricsWriter
from tests.recipes import runs


def last_line(text: str) -> str:
    """Returns the last line of what a verb said, which is its only mention of an error."""
    lines = text.splitlines()
    assert "Traceback" not in text
    assert [line for line in lines if "rror" in line] == lines[-1:]
    return lines[-1]


# Before a checkpoint is saved, while it may still be written, and between two. What is just being
# written may hinder the removal of the folders above it, as it does for `rm -r`.
@pytest.mark.fast_cases("5")
@pytest.mark.parametrize("step", [4, 5, 7])
def test_a_workdir_deleted_in_the_middle_of_a_run_is_one_line(
    tmp_path, tiny, step, monkeypatch, capfd
):
    workdir = tmp_path / "run"
    runs.at_step(monkeypatch, step, lambda: shutil.rmtree(workdir, ignore_errors=True))
    assert runs.command("train", tiny, workdir) == 2
    assert f"--workdir = {workdir} was deleted while the run trained" in last_line(
        capfd.readouterr().err
    )
    assert not workdir.exists()


def test_the_same_run_ends_well_where_nobody_deletes_it(tmp_path, tiny):  # the control
    assert runs.command("train", tiny, tmp_path / "run") == 0
    assert (tmp_path / "run" / "checkpoints" / "12").is_dir()


def read_only(*args: object, **options: object) -> None:
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


def test_a_disk_that_is_read_only_at_a_row_of_metrics_is_one_line(
    tmp_path, tiny, monkeypatch, capfd
):
    workdir = tmp_path / "run"
    open_writer = MetricsWriter.__init__

    def open_and_lose(self: MetricsWriter, *args: object) -> None:
        open_writer(self, *args)
        runs.at_step(
            monkeypatch,
            5,
            lambda: monkeypatch.setattr(self._file, "flush", read_only, raising=True),
        )

    monkeypatch.setattr(MetricsWriter, "__init__", open_and_lose)
    assert runs.command("train", tiny, workdir) == 2
    said = last_line(capfd.readouterr().err)
    assert (
        said == f"tessera: error: {workdir}/metrics.jsonl cannot be written: Read-only file system."
    )
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["4"]


def test_a_disk_that_is_read_only_at_a_checkpoint_is_one_line(tmp_path, tiny, monkeypatch, capfd):
    workdir = tmp_path / "run"
    save = Checkpoints.save

    def save_and_lose(self: Checkpoints, step: int, *args: object) -> None:
        if step == 8:
            self.wait()
            # How long Orbax's other threads wait for the folder that is not made; a process ends
            # after them.
            monkeypatch.setattr(
                "orbax.checkpoint._src.multihost.multihost.coordination_timeout", lambda: 5
            )
            monkeypatch.setattr(pathlib.Path, "mkdir", read_only)
            monkeypatch.setattr(os, "mkdir", read_only)
            monkeypatch.setattr(os, "makedirs", read_only)
        save(self, step, *args)

    monkeypatch.setattr(Checkpoints, "save", save_and_lose)
    assert runs.command("train", tiny, workdir) == 2
    said = (
        f"{workdir}/checkpoints/8: Read-only file system; it was not written. Earlier "
        "checkpoints are intact."
    )
    assert last_line(capfd.readouterr().err).endswith(said)
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["4"]

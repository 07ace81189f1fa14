"""Files and folders are there whole or not at all: claims about `storage.files`."""

import fcntl
import os
import signal
import subprocess
import sys

import pytest

from research.core.errors import Interrupted
from research.storage import files


def test_a_file_holds_what_was_written_last_and_nothing_lies_beside_it(tmp_path):
    files.write_text(tmp_path / "a.json", "{}")
    files.write_text(tmp_path / "a.json", "ü")
    assert (tmp_path / "a.json").read_bytes() == b"\xc3\xbc"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_file_that_cannot_be_written_keeps_its_old_content(tmp_path, monkeypatch):
    files.write_bytes(tmp_path / "a", b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_the_next_writer_of_a_file_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    left = [tmp_path / f"a.json.{digits}{files.UNFINISHED}" for digits in ("0123abcd", "00000000")]
    others = {"b.json.0123abcd.tmp", "a.json.tmp", "a.json.notes.tmp", "xa.json.0123abcd.tmp"}
    for path in (*left, *(tmp_path / name for name in others)):
        path.write_text("half")
    with left[1].open() as living:
        fcntl.flock(living, fcntl.LOCK_EX)
        files.write_text(tmp_path / "a.json", "{}")
        assert set(os.listdir(tmp_path)) == {"a.json", left[1].name, *others}
    files.write_text(tmp_path / "a.json", "{}")
    assert set(os.listdir(tmp_path)) == {"a.json", *others}


def test_two_writers_of_a_file_do_not_write_into_each_other(tmp_path, monkeypatch):
    """The second one writes all of its content while the first has written its own but not renamed
    it.
    """
    fsync, nested = os.fsync, []

    def meanwhile(descriptor):
        if not nested:
            nested.append(True)
            files.write_bytes(tmp_path / "a", b"second, and longer")
            assert (tmp_path / "a").read_bytes() == b"second, and longer"
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", meanwhile)
    files.write_bytes(tmp_path / "a", b"first")
    assert (tmp_path / "a").read_bytes() == b"first"
    assert os.listdir(tmp_path) == ["a"]


def test_the_folder_of_what_was_renamed_is_written_to_the_disk(tmp_path, monkeypatch):
    fsync, synced = os.fsync, []

    def noted(descriptor):
        synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), sorted(os.listdir(tmp_path))))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    files.write_bytes(tmp_path / "a", b"")
    assert synced[-1] == (str(tmp_path), ["a"])
    with files.new_folder(tmp_path / "b"):
        pass
    assert synced[-1] == (str(tmp_path), ["a", "b"])


def test_a_stop_is_no_error_of_a_bucket(tmp_path, monkeypatch):
    def stopped(path):
        raise Interrupted("stopped")

    monkeypatch.setattr(files, "bucket_of", stopped)
    monkeypatch.setattr(files, "in_bucket", lambda path: True)
    with pytest.raises(Interrupted):
        files.check_writable(tmp_path)


def test_a_folder_takes_its_name_when_all_is_in_it(tmp_path):
    with files.new_folder(tmp_path / "deep" / "final") as folder:
        (folder / "a").write_text("a")
        assert not (tmp_path / "deep" / "final").exists()
        assert folder.parent == tmp_path / "deep"
    assert (tmp_path / "deep" / "final" / "a").read_text() == "a"
    assert os.listdir(tmp_path / "deep") == ["final"]
    assert (tmp_path / "deep" / "final").stat().st_mode & 0o777 == 0o755


def test_a_folder_has_the_permissions_of_any_other(tmp_path):
    before = os.umask(0o027)
    try:
        with files.new_folder(tmp_path / "final"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "final").stat().st_mode & 0o777 == 0o750


def test_a_folder_that_was_removed_before_it_was_locked_is_made_anew(tmp_path, monkeypatch):
    """Another writer takes it for a leftover; a lock on what is no longer there would guard
    nothing.
    """
    lock, removed = fcntl.flock, []

    def too_late(descriptor, operation):
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].rmdir()
        lock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", too_late)
    with files.new_folder(tmp_path / "final") as folder:
        assert folder not in removed
        (folder / "a").write_text("a")
    assert os.listdir(tmp_path / "final") == ["a"]


def test_a_folder_vanishes_where_its_writer_fails(tmp_path):
    def write():
        with files.new_folder(tmp_path / "final") as folder:
            (folder / "a").write_text("a")
            raise ValueError("half")

    with pytest.raises(ValueError, match="half"):
        write()
    assert os.listdir(tmp_path) == []


def _made_twice(final, keep_existing):
    with files.new_folder(final, keep_existing) as folder:
        (folder / "a").write_text("second")
        with files.new_folder(final) as other:
            (other / "a").write_text("first")


def test_of_two_writers_of_one_folder_the_first_is_kept_where_both_write_the_same(tmp_path):
    _made_twice(tmp_path / "final", keep_existing=True)
    assert (tmp_path / "final" / "a").read_text() == "first"
    assert os.listdir(tmp_path) == ["final"]


def test_of_two_writers_of_one_folder_the_second_fails_where_they_differ(tmp_path):
    with pytest.raises(OSError, match="not empty"):
        _made_twice(tmp_path / "final", keep_existing=False)
    assert os.listdir(tmp_path) == ["final"]


WRITER = """
import pathlib, sys, time
from research.storage import files
with files.new_folder(pathlib.Path(sys.argv[1])) as folder:
    (folder / "a").write_text("a")
    print(folder.name, flush=True)
    time.sleep(600)
"""


def _writer(final):
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(final)], stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline().strip()


def test_the_next_writer_removes_what_a_killed_one_left_and_nothing_else(tmp_path):
    (tmp_path / ".notes").mkdir()
    living, living_folder = _writer(tmp_path / "one")
    killed, killed_folder = _writer(tmp_path / "two")
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert set(os.listdir(tmp_path)) == {".notes", living_folder, killed_folder}
        with files.new_folder(tmp_path / "three"):
            pass
        assert set(os.listdir(tmp_path)) == {".notes", living_folder, "three"}
        assert (tmp_path / living_folder / "a").read_text() == "a"
    finally:
        living.kill()
        living.wait()

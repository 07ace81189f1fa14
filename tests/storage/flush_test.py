"""Files that are flushed while they are written."""

import os
import threading

import pytest

from research.storage import flush
from research.storage.flush import BackgroundFlusher, supports_direct_io


def test_what_was_written_is_flushed_a_stride_at_a_time_and_never_twice_at_once(monkeypatch):
    monkeypatch.setattr(flush, "STRIDE", 10)
    lock, calls, go = threading.Lock(), [], threading.Event()

    def slow():
        assert lock.acquire(blocking=False), "two at once"
        go.wait()
        calls.append(threading.current_thread())
        lock.release()

    with BackgroundFlusher(slow) as files:
        files.wrote(9)
        assert not calls
        files.wrote(1)  # goes on while the first is under way
        go.set()
        for _ in range(4):
            files.wrote(5)
    assert len(calls) == 3
    assert threading.current_thread() not in calls


@pytest.mark.parametrize("strides", [1, 2])
def test_a_full_disk_is_told_at_the_next_stride_or_the_end(monkeypatch, strides):
    monkeypatch.setattr(flush, "STRIDE", 1)

    def full():
        raise OSError("No space left on device")

    def write():
        with BackgroundFlusher(full) as files:
            for _ in range(strides):
                files.wrote(1)

    with pytest.raises(OSError, match="No space"):
        write()


def test_a_flushed_file_is_whole(tmp_path):
    with (tmp_path / "file").open("wb", buffering=0) as file:
        file.write(bytes(range(256)))
        flush.flush(file.fileno())
        file.write(b"more")
        os.fsync(file.fileno())
    assert (tmp_path / "file").read_bytes() == bytes(range(256)) + b"more"


def test_direct_reading_is_not_tried_where_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "file"
    assert not supports_direct_io(path)
    path.write_bytes(b"text")

    def refuse(*_):
        raise OSError("Invalid argument")

    monkeypatch.setattr(os, "preadv", refuse)
    assert not supports_direct_io(path)

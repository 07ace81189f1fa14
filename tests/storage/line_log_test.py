"""A log of lines takes files alone, and says in a line what keeps it from writing."""

import os
import pathlib

import pytest

from research.core.errors import UserError
from research.storage.line_log import LineLog


def test_what_is_no_file_is_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (pipe, tmp_path, pathlib.Path("/dev/null")):
        with pytest.raises(UserError, match=r"^out = .* must be a file"):
            LineLog(path, {})
    assert not list(tmp_path.glob("*.source.json"))


def test_a_link_to_a_file_is_a_file(tmp_path):
    (tmp_path / "out.jsonl").touch()
    link = tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "out.jsonl")
    with LineLog(link, {}) as log:
        log.append({"a": 1})
    assert (tmp_path / "out.jsonl").read_text() == '{"a": 1}\n'


def test_a_full_disk_is_said_in_a_line(tmp_path):
    def append_to_a_full_disk() -> None:
        with LineLog(tmp_path / "out", {}) as log:
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, log._file.fileno())
            os.close(full)
            log.append({"a": 1})

    with pytest.raises(UserError, match=r"^out = .* cannot be written: No space left"):
        append_to_a_full_disk()

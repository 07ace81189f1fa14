"""What the command line prints: its help, its progress, and where its output goes."""

import fcntl
import os
import pathlib
import re
import struct
import termios

import pytest

from research import cli
from tests.recipes import runs

ROOT = pathlib.Path(__file__).parent.parent


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_shows_examples_first(verb, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.index("examples:") < out.index("options:")
    assert f"  tessera {verb} " in out
    assert max(map(len, out.splitlines())) <= 120


def test_overview_lists_every_verb(capsys):
    for argv in ([], ["--help"], ["help"]):
        assert cli.main(argv) == 0
        out = capsys.readouterr().out
        assert all(f"  {verb}" in out for verb in cli.VERBS)


def test_the_version_is_that_of_the_package(capsys):
    declared = re.search(r'version="(.+)"', (ROOT / "setup.py").read_text())
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"tessera {declared[1]}\n"


@pytest.mark.processes
def test_reader_that_leaves_early_is_no_error(tiny: pathlib.Path):
    process = runs.spawn("data", f"--config={tiny}", "--rows=4")
    process.stdout.close()
    stderr = process.stderr.read()
    process.stderr.close()
    assert process.wait() == 128 + 13, stderr
    assert "Traceback" not in stderr
    assert "Exception" not in stderr


@pytest.mark.processes
def test_output_stays_readable_where_a_terminal_has_few_letters(tiny: pathlib.Path):
    process = runs.spawn(
        "train", "--help", PYTHONIOENCODING="ascii:strict", LC_ALL="C", HOME="/nowhere"
    )
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "examples:" in out
    process = runs.spawn(PYTHONIOENCODING="ascii:strict", LC_ALL="C")
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")


@pytest.mark.processes
def test_progress_is_lines_on_a_pipe_and_a_bar_on_a_terminal(tiny: pathlib.Path, tmp_path):
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    process = runs.spawn(
        "train", f"--config={tiny}", f"--workdir={tmp_path / 'run'}", terminal=slave
    )
    os.close(slave)
    shown = b""
    while True:
        try:
            data = os.read(master, 4096)
        except OSError:  # Linux says so at the end of a terminal
            break
        if not data:
            break
        shown += data
    os.close(master)
    assert process.wait() == 0
    assert b"\rtrain: " in shown
    assert b"step 12/12" in shown

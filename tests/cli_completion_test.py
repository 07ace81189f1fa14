"""Completion in the shell: what argcomplete's shell function gets for a command line."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
# The command line as it is where argcomplete is not installed.
WITHOUT_PACKAGE = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *_: None if name == "argcomplete" else find(name)
sys.modules["argcomplete"] = None
from research.__main__ import main
main()
"""


def completions(line: str, folder: pathlib.Path, *command: str) -> list[str]:
    """Returns what the shell is offered for a line whose end is being typed."""
    answer = folder / "answer"
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_COMP_WORDBREAKS": " \t\n\"'><=;|&(:",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    run = command or (sys.executable, "-m", "research")
    done = subprocess.run(run, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    offered = answer.read_text().splitlines() if answer.exists() else []
    return sorted(each.strip() for each in offered)


def test_verbs_are_completed(tmp_path):
    assert completions("tessera d", tmp_path) == ["data", "describe", "doctor"]
    assert completions("tessera fly --w", tmp_path) == []


@pytest.mark.processes
@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("tessera data --r", ["--rows"]),
        ("tessera train --", ["--config", "--fallback", "--help", "--time-budget", "--workdir"]),
        ("tessera data --config=", ["folder/", "one.py"]),
        ("tessera data --config o", ["one.py"]),
        ("tessera data --config.train.steps=5 --config=one.py --ro", ["--rows"]),
        ("tessera bench lat", ["latent"]),
    ],
)
def test_flags_and_config_files_are_completed(tmp_path, line, offered):
    (tmp_path / "one.py").touch()
    (tmp_path / "two.txt").touch()
    (tmp_path / "folder").mkdir()
    assert completions(line, tmp_path) == offered


def test_without_the_package_a_command_runs_as_ever(tmp_path):
    command = (sys.executable, "-c", WITHOUT_PACKAGE)
    assert completions("tessera d", tmp_path, *command) == []


def test_the_shell_finds_the_marker_at_the_beginning_of_the_entry_point():
    # argcomplete reads this many characters of the module that the console script imports.
    assert "PYTHON_ARGCOMPLETE_OK" in (ROOT / "research" / "__main__.py").read_text()[:1024]

"""The quickstart refuses a time in which it could not end, before it installs anything."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).parents[2] / "launch" / "quickstart.sh"


def quickstart(folder: pathlib.Path, minutes: str) -> subprocess.CompletedProcess[str]:
    """Runs a copy of the script whose commands are printed instead of run."""
    launch = folder / "launch"
    launch.mkdir()
    shutil.copy(SCRIPT, launch)
    (launch / "environment.sh").write_text("PYTHON=echo\n")
    return subprocess.run(
        ["bash", launch / "quickstart.sh"],
        env={**os.environ, "MINUTES": minutes},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("minutes", "said"),
    [
        ("2", "2 is too few: the packages, the corpus and a model need at least 5."),
        ("0", "0 is too few: the packages, the corpus and a model need at least 5."),
        ("soon", "soon is not a whole number of minutes."),
        ("6.5", "6.5 is not a whole number of minutes."),
        ("-6", "-6 is not a whole number of minutes."),
    ],
)
def test_too_little_time_is_refused_in_one_line(tmp_path: pathlib.Path, minutes: str, said: str):
    done = quickstart(tmp_path, minutes)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"MINUTES = {said}\n"


@pytest.mark.parametrize(("minutes", "seconds"), [("5", 255), ("08", 435), ("", 315)])
def test_enough_time_becomes_the_budget_of_the_training(
    tmp_path: pathlib.Path, minutes: str, seconds: int
):
    done = quickstart(tmp_path, minutes)
    assert (done.returncode, done.stderr) == (0, "")
    [budget] = re.findall(r"--time-budget=(\d+)", done.stdout)
    # What the script itself took is subtracted.
    assert seconds - 10 <= int(budget) <= seconds

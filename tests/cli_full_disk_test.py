"""A full disk is one line, and spares what was written before."""

import pathlib
import shutil
import subprocess
from collections.abc import Callable, Iterator

import pytest

from tests.cli_test import refused
from tests.recipes import runs


@pytest.fixture
def small_disk(tmp_path: pathlib.Path) -> Iterator[Callable[[int], pathlib.Path]]:
    """Makes a disk of so many KiB; skips where nothing can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def make(kibibytes: int) -> pathlib.Path:
        if shutil.which("mount") is None:
            pytest.skip("there is no mount command to make a small disk with")
        mount = ["mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "none", str(folder)]
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
        return folder

    yield make
    if folder.is_mount():
        # Lazily: threads of the run that failed may hold a file for a moment longer.
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_full_disk_is_one_line_and_spares_the_checkpoints_before(
    tiny: pathlib.Path, unbroken, small_disk, capfd
):
    disk = small_disk(1600)  # room for two checkpoints of this run
    workdir = disk / "run"
    assert (
        runs.command(
            "train", tiny, workdir, "--config.checkpoint.keep=9", "--config.checkpoint.every=1"
        )
        == 2
    )
    lines = capfd.readouterr().err.splitlines()
    assert not [line for line in lines if "Traceback" in line or "Error" in line]
    assert (
        "No space left on device; it was not written. Earlier checkpoints are intact." in lines[-1]
    )
    # What was cut off may leave an unfinished folder, which a later run does not take for a
    # checkpoint.
    whole = sorted(
        int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal()
    )
    assert whole == list(range(1, len(whole) + 1))
    shutil.copytree(workdir, disk.parent / "roomy")
    runs.assert_same_state(runs.run(tiny, disk.parent / "roomy"), unbroken.state)


def test_disk_that_is_full_from_the_start_is_one_line(tiny: pathlib.Path, small_disk, capsys):
    assert "No space left on device" in refused(
        capsys, "train", f"--config={tiny}", f"--workdir={small_disk(4) / 'run'}"
    )

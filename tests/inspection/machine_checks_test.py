"""Checks of a machine have a name, a status and what was found."""

import os
import pathlib
import subprocess

from research.inspection import machine_checks


def test_a_sound_machine_has_a_check_of_each_kind(tmp_path):
    checks, devices = machine_checks.machine_checks(tmp_path)
    names = {check.name for check in checks}
    assert names >= {"python", "packages", "devices", "memory", "workdir", "cache"}
    assert not [check for check in checks if check.status == "fail"]
    assert len(devices) == 8


def test_a_folder_that_cannot_be_written_fails_and_little_space_warns(tmp_path, monkeypatch):
    def workdir(path: pathlib.Path) -> machine_checks.Check:
        checks, _ = machine_checks.machine_checks(path)
        (check,) = [check for check in checks if check.name == "workdir"]
        return check

    assert workdir(pathlib.Path("/proc/run")).status == "fail"
    assert workdir(tmp_path / "not" / "there" / "yet").status == "ok"
    monkeypatch.setattr(machine_checks, "LEAST_DISK", 1e30)
    assert workdir(tmp_path).status == "warn"


def test_other_processes_on_a_gpu_are_named_and_this_one_is_not(monkeypatch):
    output = f"{os.getpid()}, python\n4321, other\n"

    def run(command, **options):
        return subprocess.CompletedProcess(command, 0, stdout=output)

    monkeypatch.setattr(machine_checks.subprocess, "run", run)
    assert machine_checks._other_gpu_processes() == ["4321, other"]

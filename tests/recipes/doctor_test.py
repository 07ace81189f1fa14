"""The doctor says in one screen what would fail later."""

import json
import pathlib

import pytest

from research import cli
from tests.recipes import runs


def examine(capsys, *argv: str) -> tuple[int, list[str]]:
    capsys.readouterr()
    status = cli.main(["doctor", *argv])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 24
    return status, lines


def test_sound_config_passes_on_one_screen(tiny: pathlib.Path, tmp_path, capsys):
    status, lines = examine(capsys, f"--config={tiny}", f"--workdir={tmp_path}")
    assert status == 0
    assert any(line.startswith("ok    config") and "mesh of data 8" in line for line in lines)
    assert not any(line.startswith("FAIL") for line in lines)


@pytest.mark.processes
def test_platform_that_is_not_here_is_a_finding_and_no_traceback(tiny: pathlib.Path, tmp_path):
    process = runs.spawn(
        "doctor", f"--config={tiny}", f"--workdir={tmp_path}", JAX_PLATFORMS="cuda"
    )
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1, err
    assert "Traceback" not in err
    assert [line for line in out.splitlines() if line.startswith("FAIL  devices")]
    assert [line for line in out.splitlines() if line.startswith("warn  config")]
    assert [line for line in out.splitlines() if line.startswith("ok    workdir")]


def test_workdir_that_cannot_be_written_fails(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for workdir in ("/proc/run", tmp_path / "file"):
        status, lines = examine(capsys, f"--workdir={workdir}")
        assert status == 1
        assert [line for line in lines if line.startswith("FAIL  workdir")], lines


def test_mesh_and_model_that_do_not_fit_fail(tiny: pathlib.Path, tmp_path, capsys):
    changes = {
        "mesh.data": 3,
        "mesh.tensor": 8,
        "train.batch_size": 9,
        "optim.schedule.warmup_steps": 99,
    }
    for change, value in changes.items():
        status, lines = examine(
            capsys, f"--config={tiny}", f"--workdir={tmp_path}", *runs.flags({change: value})
        )
        assert status == 1
        assert any(
            line.startswith("FAIL  config") and f"{change.rpartition('.')[0]}" in line
            for line in lines
        ), lines


def test_missing_corpus_and_foreign_workdir_fail(tiny: pathlib.Path, unbroken, tmp_path, capsys):
    status, lines = examine(
        capsys, f"--config={tiny}", f"--workdir={unbroken.workdir}", "--config.train.seed=3"
    )
    assert status == 1
    assert any("belongs to another config: train.seed" in line for line in lines)
    status, lines = examine(
        capsys, f"--config={tiny}", f"--workdir={tmp_path}", "--config.data.sources.0.path=/nowhere"
    )
    assert status == 1
    assert any("matches no file" in line for line in lines)


def test_json_has_each_check_with_name_status_and_message(tiny: pathlib.Path, tmp_path, capsys):
    for mesh, status in ((8, 0), (3, 1)):
        argv = ("doctor", f"--config={tiny}", f"--workdir={tmp_path}", f"--config.mesh.data={mesh}")
        capsys.readouterr()
        assert cli.main([*argv, "--json"]) == status
        found = json.loads(capsys.readouterr().out)
        assert found.keys() == {"ok", "checks"}
        assert found["ok"] == (status == 0)
        assert all(check.keys() == {"name", "status", "message"} for check in found["checks"])
        by_name = {check["name"]: check for check in found["checks"]}
        assert {"python", "packages", "devices", "memory", "workdir", "cache"} <= by_name.keys()
        assert by_name["workdir"]["status"] == "ok"
        assert by_name["config"]["status"] == ("ok" if status == 0 else "fail")
        assert ("mesh of data 8" in by_name["config"]["message"]) == (status == 0)

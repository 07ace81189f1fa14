"""`tessera compile`: one run, or all presets with figures that are kept."""

import json
import pathlib
import re
import subprocess

import pytest

from research import cli
from research.recipes import pods
from tests.recipes import runs

FOLDER = runs.ROOT / "configs" / "pods"
SMALL = f"{FOLDER / 'llama2.py'}:7b-v4-128"


OPEN_STAGES = ("--config.mesh.data=1", "--config.mesh.pipeline=-1")


def compiled(capsys, *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["compile", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def figures(tmp_path, monkeypatch) -> pathlib.Path:
    """The file of figures, another one than that of the documents."""
    path = tmp_path / "pods.json"
    monkeypatch.setattr(pods, "FIGURES", path)
    return path


def test_a_run_is_compiled_for_cpu_devices(tiny: pathlib.Path, capsys):
    argv = (f"--config={tiny}", "--devices=cpu:8", "--config.mesh.fsdp=2")
    status, out, err = compiled(capsys, *argv)
    assert (status, err) == (0, "")
    assert out.startswith("8 devices, cpu:8: data 4 × fsdp 2\n")
    assert re.search(r"^all-gather +fsdp +memory", out, re.MULTILINE)


def test_a_schedule_is_said_to_do_nothing_where_there_are_no_stages(tiny, capsys):
    argv = (f"--config={tiny}", "--config.train.pipeline.schedule=gpipe", *OPEN_STAGES)
    # What is left of the devices after data are stages: two, and none.
    assert compiled(capsys, *argv, "--devices=cpu:2")[::2] == (0, "")
    status, _, err = compiled(capsys, *argv, "--devices=cpu:1")
    assert status == 0
    assert "does nothing: mesh.pipeline = 1 has no stages" in err


@pytest.mark.parametrize(
    ("argv", "error"),
    [
        ((), "compile takes either --config or --all."),
        (("--all=configs/pods", "--json"), "--json is not for --all."),
        (("--config=a.py", "--only=b"), "--only is for --all."),
        (("--config=a.py", "--again"), "--again is for --all."),
        (
            (f"--all={FOLDER}", "--config.train.steps=3"),
            "--config.train.steps is not for --all.",
        ),
        ((f"--all={FOLDER}", "--only=9b"), "--only = '9b' is in no name of "),
        ((f"--all={runs.ROOT / 'configs' / 'model'}",), "has no file with PRESETS."),
        (
            (f"--config={runs.ROOT / 'configs' / 'model' / 'llama.py'}:3-8b",),
            "--devices is needed: the config names none, as mesh.devices would.",
        ),
    ],
)
def test_a_mistake_is_one_line(argv: tuple[str, ...], error: str, capsys):
    status, out, err = compiled(capsys, *argv)
    assert (status, out) == (2, "")
    assert error in err
    assert err.count("\n") == 1


def compiler(counts: list[list[str]], output: str, status: int = 0):
    """Returns what stands for `subprocess.run`, and notes each command."""

    def run(command: list[str], **options) -> subprocess.CompletedProcess:
        counts.append(command)
        return subprocess.CompletedProcess(command, status, output, "tessera: error: too small\n")

    return run


# As `compile --json` prints it.
REPORT = {
    "devices": "v4:4x4x4",
    "mesh": {"data": 4, "fsdp": 16},
    "memory": {"total": 10**10, "limit": 2 * 10**10, "margin": 0.5},
    "traffic": [{"sent_bytes": 10**9, "is_least": False}],
    "exposed": 0.25,
    "cost": {"compile_seconds": 60.0, "cpu_seconds": 90.0, "host_bytes": 2 * 10**9},
    "accidents": [],
}


def test_presets_are_compiled_once(figures, monkeypatch):
    pytest.importorskip("libtpu", reason="its version is part of the digest")
    commands: list[list[str]] = []
    monkeypatch.setattr(subprocess, "run", compiler(commands, json.dumps(REPORT)))
    specs = [SMALL, f"{FOLDER / 'gpt3.py'}:175b-v5p-1024"]
    assert pods.compile_pods(str(FOLDER), specs, specs, again=False) == []
    assert len(commands) == 2
    found = json.loads(figures.read_text())
    assert list(found["pods"]) == ["llama2.py:7b-v4-128", "gpt3.py:175b-v5p-1024"]
    assert found["rows"][0][:5] == [
        "`llama2.py:7b-v4-128`",
        "v4:4x4x4",
        "data 4 × fsdp 16",
        "10.0 GB of 20.0 GB",
        "50%",
    ]

    # Nothing changed, so nothing is compiled; --again compiles all the same.
    pods.compile_pods(str(FOLDER), specs, specs, again=False)
    assert len(commands) == 2
    pods.compile_pods(str(FOLDER), specs, specs[:1], again=True)
    assert len(commands) == 3
    # A preset that is gone has no figures.
    pods.compile_pods(str(FOLDER), specs[1:], specs[1:], again=True)
    assert list(json.loads(figures.read_text())["pods"]) == ["gpt3.py:175b-v5p-1024"]


PRESETS = """
from configs.pods import llama2

PRESETS = ("mine",)


def get_config(preset):
    values = llama2.get_config("7b-v4-128")
    {change}
    return values
"""


def test_figures_of_another_folder_are_kept_there(figures, monkeypatch, tmp_path):
    pytest.importorskip("libtpu", reason="its version is part of the digest")
    figures.write_text('{"pods": {"ours": 1}}')
    no_limit = {"total": 10**10, "limit": None, "margin": None}
    report = json.dumps(REPORT | {"memory": no_limit})
    monkeypatch.setattr(subprocess, "run", compiler([], report))
    folder = tmp_path / "others"
    folder.mkdir()
    (folder / "mine.py").write_text(PRESETS.format(change=""))
    specs = pods.pod_specs(str(folder))
    assert pods.compile_pods(str(folder), specs, specs, again=False) == []
    found = json.loads((folder / "figures.json").read_text())
    assert found["command"] == f"tessera compile --all={folder}"
    # Devices without a limit, such as a CPU's.
    assert found["rows"][0][3:5] == ["10.0 GB", "–"]
    assert json.loads(figures.read_text()) == {"pods": {"ours": 1}}


def test_a_preset_that_names_no_devices_is_refused(tmp_path, capsys):
    change = "del values.mesh['devices']"
    (tmp_path / "mine.py").write_text(PRESETS.format(change=change))
    status, out, err = compiled(capsys, f"--all={tmp_path}")
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert "mesh.devices is not set in " in err


def test_a_preset_that_cannot_be_compiled_is_named_and_has_no_figures(figures, monkeypatch, capsys):
    pytest.importorskip("libtpu", reason="its version is part of the digest")
    monkeypatch.setattr(subprocess, "run", compiler([], "", status=2))
    status, _, err = compiled(capsys, f"--all={FOLDER}", "--only=7b-v4-128")
    assert status == 1
    assert err == "llama2.py:7b-v4-128: tessera: error: too small\n"
    assert not figures.exists()


def test_a_digest_follows_from_values_and_versions():
    versions = {"jax": "0.10.2", "libtpu": "0.0.42"}
    found = pods.digest(SMALL, versions)
    assert found == pods.digest(SMALL, dict(versions))
    assert found != pods.digest(SMALL, versions | {"libtpu": "0.0.43"})
    assert found != pods.digest(f"{FOLDER / 'llama2.py'}:70b-v4-1024", versions)


# Whole sums of what projects to the latent, less than a hundredth of what these send:
# docs/parallelism.md, "What the compilers taught".
KNOWN_ACCIDENTS = {
    "mixtures.py:deepseek-v3-671b-v5p-2048": 3,
    "mixtures.py:1t-v5p-4096": 2,
}


def figure_faults(figures: dict, specs: list[str]) -> list[str]:
    """Returns the presets whose figures are missing or are of other values, and those with less
    than 5 % of the memory left or with an accident that is not known.
    """
    faults = []
    for spec in specs:
        name = pods.name_of(spec)
        if name not in figures:
            faults.append(f"{name}: no figures")
            continue
        entry = figures[name]
        if entry["digest"] != pods.digest(spec, entry["versions"]):
            faults.append(f"{name}: figures of other values")
        if entry["report"]["memory"]["margin"] < 0.05:
            faults.append(f"{name}: too little memory is left")
        accidents = entry["report"]["accidents"]
        sums = [each for each in accidents if "all-reduce" in each["where"]]
        known = KNOWN_ACCIDENTS.get(name, 0)
        if len(accidents) > known or accidents != sums:
            faults.append(f"{name}: accidents")
    return faults


def test_every_preset_has_figures_fits_and_has_no_accident():
    faults = figure_faults(pods.read_figures(), pods.pod_specs(str(FOLDER)))
    assert not faults, f"tessera compile --all=configs/pods mends: {faults}"


def test_figures_that_do_not_hold_are_found():
    figures = pods.read_figures()
    spec = f"{FOLDER / 'llama3.py'}:70b-v5p-512"
    name = pods.name_of(spec)
    assert figure_faults({}, [spec]) == [f"{name}: no figures"]
    other = figures[name] | {"digest": "0"}
    assert figure_faults({name: other}, [spec]) == [f"{name}: figures of other values"]


@pytest.mark.compilers
@pytest.mark.thorough
def test_the_figures_are_what_the_compiler_says(capsys):
    pytest.importorskip("libtpu", reason="needs the extra `tpu`")
    status, out, _ = compiled(capsys, f"--config={SMALL}", "--json")
    found = json.loads(out)
    kept = pods.read_figures()[pods.name_of(SMALL)]["report"]
    assert status == 0
    assert found["accidents"] == []
    assert found["memory"]["total"] == pytest.approx(kept["memory"]["total"], rel=0.01)
    assert found["memory"]["margin"] > 0.05
    sent = [{(one["kind"], *one["axes"]): one["sent_bytes"]} for one in found["traffic"]]
    assert sent == [{(one["kind"], *one["axes"]): one["sent_bytes"]} for one in kept["traffic"]]

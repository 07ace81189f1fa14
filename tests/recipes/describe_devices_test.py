"""`tessera describe --devices` shows a config on devices that are not here."""

import json
import pathlib

import pytest
from jax.experimental import topologies

from research import cli
from research.core import config as configs
from tests.recipes import runs
from tests.tiny import tiny_config

MODELS = runs.ROOT / "configs" / "model"
CUBE = ("--config.mesh.fsdp=2", "--config.mesh.tensor=2")


def described(capsys, *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["describe", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_training_config_is_shown_on_its_mesh(tiny: pathlib.Path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, out, err = described(capsys, f"--config={tiny}", "--devices=cpu:8", *CUBE)
    assert (status, err) == (0, "")
    assert out.startswith("8 devices, cpu:8\ndata 2    ┌───┬───┐  rows of the batch\n")
    assert "activations of one layer, " in out
    # Nothing was drawn into a file.
    assert not list(tmp_path.iterdir())


def test_json_has_the_same_content(tiny: pathlib.Path, capsys):
    argv = (f"--config={tiny}", "--devices=cpu:8", *CUBE)
    _, text, _ = described(capsys, *argv)
    status, out, _ = described(capsys, *argv, "--json")
    assert status == 0
    found = json.loads(out)
    assert found.keys() == {
        "config",
        "devices",
        "mesh",
        "parameters",
        "activations",
        "one_device",
        "notes",
    }
    assert found["config"]["mesh"]["tensor"] == 2
    assert found["devices"]["num_devices"] == 8
    assert [(axis["name"], axis["size"]) for axis in found["mesh"]] == [
        ("data", 2),
        ("fsdp", 2),
        ("tensor", 2),
    ]
    assert f"{found['one_device']['total']:,}" in text
    lines = [line.strip() for line in text.splitlines()]
    for group in (*found["parameters"], *found["activations"]):
        for array in group["arrays"]:
            start = f"{array['name']}  "
            line = next(line for line in lines if line.startswith(start))
            assert line.endswith(f" {array['device_bytes']:,}")
            assert all(axis in line for axes in array["mesh_axes"] for axis in axes)


def test_no_compiler_of_the_devices_is_needed(monkeypatch, capsys):
    def missing(*args, **kwargs):
        raise AssertionError("a topology was asked for")

    monkeypatch.setattr(topologies, "get_topology_desc", missing)
    status, out, _ = described(
        capsys,
        f"--config={MODELS}/llama.py:3-70b",
        "--devices=v5p:8x8x8",
        "--config.mesh.fsdp=64",
        "--config.mesh.tensor=8",
    )
    assert status == 0
    assert "layers 80 × embed 8,192/fsdp × heads 64/tensor × head 128" in out
    # 70,553,706,496 parameters in float32, of which tensor does not shard 161 norms of 8,192.
    norms = 161 * 8192
    assert f"{4 * ((70_553_706_496 - norms) // 512 + norms // 64):,}" in out
    assert " of its 102.0 GB" in out


def test_a_model_alone_gets_a_run_and_says_which(capsys):
    preset = f"--config={MODELS}/llama.py:3-8b"
    _, out, _ = described(capsys, preset, "--devices=v5e:4x4*2", "--config.mesh.tensor=8")
    assert out.startswith("The config is a model alone.")
    for note in (
        "mesh.slices.data = 2",
        "train.sequence_length = 8,192, the model's max_length",
        "train.batch_size = 4, a row for each shard (data × fsdp × expert)",
        "optim.name = adamw",
    ):
        assert f"  {note}\n" in out
    assert "data 4    ┌─────╥─────┐" in out
    assert "activations of one layer, 4 rows of 8,192 tokens" in out

    chosen = ("--config.train.batch_size=32", "--config.train.sequence_length=1024")
    _, out, _ = described(capsys, preset, "--devices=v5e:4x4", *chosen, "--config.optim.name=lion")
    assert "activations of one layer, 32 rows of 1,024 tokens" in out
    assert "optimizer, lion" in out
    assert "train.batch_size =" not in out

    _, out, _ = described(capsys, preset, "--devices=v5e:4x4", "--config.train.accumulation=3")
    axes = "data × fsdp × expert × train.accumulation"
    assert f"  train.batch_size = 48, a row for each shard ({axes})\n" in out


@pytest.mark.fast_cases("bert.py")
@pytest.mark.parametrize("name", ["bert.py", "prefix.py", "t5.py", "mixtral.py"])
def test_a_preset_of_every_structure_is_shown(name: str, capsys):
    status, out, err = described(capsys, f"--config={MODELS}/{name}", "--devices=cpu:8")
    assert (status, err) == (0, "")
    assert "data 8" in out


def test_a_workdir_is_shown_as_it_was_trained_or_as_a_model_alone(tiny, tmp_path, capsys):
    values = configs.load_file(str(tiny))
    values["mesh"] = {"tensor": 2}
    (tmp_path / "config.json").write_text(configs.to_json(values))
    status, out, _ = described(capsys, f"--workdir={tmp_path}", "--devices=cpu:4")
    assert status == 0
    assert out.startswith("4 devices, cpu:4\ndata 2    ")
    (tmp_path / "config.json").write_text(configs.to_json({"model": tiny_config()}))
    status, out, _ = described(capsys, f"--workdir={tmp_path}", "--devices=cpu:4")
    assert status == 0
    assert out.startswith("The config is a model alone.")


def test_mistakes_get_one_line(tiny: pathlib.Path, tmp_path, capsys):
    preset = f"--config={MODELS}/llama.py:3-8b"
    wrong = {
        (preset, "--devices=v5p"): "--devices = 'v5p' names no devices. Use a form such as",
        (preset, "--devices=v9:4x4"): "'v9' is no kind of device.",
        (preset, "--devices=cpu:8", "--length=32"): "--length: --devices draws no",
        (preset, "--devices=cpu:8", "--out=x"): "--out: --devices draws no",
        ("--devices=cpu:8",): "either --config or --workdir",
        (f"--workdir={tmp_path}", "--devices=cpu:8"): "is not a workdir",
        (f"--workdir={tmp_path}", "--devices=cpu:8", CUBE[0]): "--config.mesh.fsdp: it changes a",
        (preset, "--devices=cpu:8", "--config.mesh.fsdp=3"): "mesh.fsdp = 3 does not fit 8 dev",
        (preset, "--devices=cpu:8", "--config.mesh.expert=8"): "no layer of the model has experts",
        (preset, "--devices=cpu:16", "--config.mesh.tensor=16"): "does not divide kv_heads = 8",
        (preset, "--devices=cpu:8", "--config.mesh.fsdpp=2"): "Did you mean 'fsdp'?",
        (preset, "--devices=cpu:8", "--config.num_layer=2"): "Did you mean 'num_layers'?",
        (f"--config={tiny}", "--devices=h200:16"): "but the devices are in 2 slices. Use mesh.sl",
    }
    for argv, message in wrong.items():
        status, out, err = described(capsys, *argv)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert message in err

"""`tessera describe --serve` says what an engine takes of a device, and what fits."""

import json
import pathlib
import re

import pytest

from research import cli
from research.core import config as configs
from research.inference.serve_config import bind_serve
from tests.recipes import runs
from tests.tiny import tiny_config

SERVE = runs.ROOT / "configs" / "serve"
MODELS = runs.ROOT / "configs" / "model"


def described(capsys, *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["describe", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("path", sorted(SERVE.glob("[!_]*.py")), ids=lambda path: path.stem)
def test_configs_of_engines_bind(path: pathlib.Path):
    values = configs.load_file(str(path))
    assert bind_serve(values).tokens == 0
    assert bind_serve({**values, "speculate": "lookup"}).drafts == 7
    assert bind_serve({**values, "speculate": "mtp"}).drafts == 4


def test_a_workdir_is_sized_for_this_host(tmp_path, capsys):
    (tmp_path / "config.json").write_text(configs.to_json({"model": tiny_config()}))
    argv = (f"--serve={SERVE}/default.py", f"--workdir={tmp_path}")
    status, out, _ = described(capsys, *argv)
    assert status == 0
    # Two layers, keys and values, 2 heads of 4 numbers, 16 tokens, 4 bytes.
    assert re.search(r"^pages +128 of 16 tokens and 2,048 bytes, 0.3 MB$", out, re.MULTILINE)
    assert re.search(r"^tokens +2,048$", out, re.MULTILINE)
    assert re.search(r"^sequences +32 of max_length = 64 at a time; 16 slots", out, re.MULTILINE)
    assert re.search(r"^programs +6: read, 2 rows; read, 8 rows; ", out, re.MULTILINE)
    status, out, _ = described(capsys, *argv, "--json")
    found = json.loads(out)
    assert (found["serve"]["tokens"], found["sequences"]) == (2048, 32)
    assert len(found["programs"]) == 6
    assert not (tmp_path / "plots").exists()


def test_a_model_on_named_devices_is_sharded(tmp_path, capsys):
    argv = [f"--serve={SERVE}/pod.py", f"--config={MODELS}/llama.py:3-8b", "--json"]
    argv += ["--config.max_length=8192", "--config.dtype=bfloat16"]
    argv += ["--config.param_dtype=bfloat16", "--devices=h200:8"]
    sizes = {}
    for tensor in (1, 8):
        status, out, err = described(capsys, *argv, f"--config.mesh.tensor={tensor}")
        assert status == 0, err
        found = json.loads(out)
        assert found["replicas"] == 8 // tensor
        sizes[tensor] = found["sizes"]
    # 8 billion parameters in 16 bits; 32 layers, keys and values, 8 heads of 128 numbers.
    assert sizes[1]["weights"] == pytest.approx(16.06e9, rel=0.01)
    assert sizes[1]["page"] == 16 * 32 * 2 * 8 * 128 * 2
    assert sizes[8]["page"] == sizes[1]["page"] // 8
    assert sizes[8]["weights"] == pytest.approx(sizes[1]["weights"] / 8, rel=0.01)


def test_layers_with_a_window_leave_room_for_more_tokens(capsys):
    argv = [f"--serve={SERVE}/default.py", f"--config={MODELS}/gemma.py:3-27b"]
    argv += ["--config.dtype=bfloat16", "--config.param_dtype=bfloat16", "--devices=h200:1"]
    status, out, err = described(capsys, *argv)
    assert status == 0, err
    # 10 layers attend to all tokens, 52 to 1,024: with keys and values of 16 heads of 128 numbers.
    page = 16 * 2 * 16 * 128 * 2
    pages = f"^pages +38,912 of 16 tokens and {10 * page:,} bytes, 51.00 GB$"
    assert re.search(pages, out, re.MULTILINE)
    # Of 16 slots 1,024 tokens and a step's 64, and a page; as many for prompts that have ended.
    count = 2 * 16 * (1088 // 16 + 1)
    windows = (
        f"^windows +{count:,} pages of {52 * page:,} bytes, in layers with a window, 15.06 GB$"
    )
    assert re.search(windows, out, re.MULTILINE)
    # As docs/inference.md says.
    assert re.search("^tokens +622,592$", out, re.MULTILINE)


def test_what_does_not_fit_is_one_line(tmp_path, capsys):
    preset = f"--config={MODELS}/llama.py:3-70b"
    default = f"--serve={SERVE}/default.py"
    (tmp_path / "bad.py").write_text(
        "import ml_collections\n\ndef get_config():\n"
        "    return ml_collections.ConfigDict({'slot': 3})\n"
    )
    wrong = {
        (default, preset, "--devices=h200:1"): "memory = 0.8 is too little: beside the weights",
        (default, preset, "--devices=h200:8", "--config.mesh.pipeline=2"): "mesh.pipeline = 2",
        (default, preset, "--devices=h200:8", "--config.mesh.tensor=3"): "mesh.tensor = 3",
        (default, preset, "--length=32"): "--length: --serve draws no attention masks",
        (default,): "either --config or --workdir",
        (f"--serve={tmp_path}/none.py", preset): "is not a file",
        (f"--serve={tmp_path}/bad.py", preset): "slot is not a config field",
    }
    for argv, message in wrong.items():
        status, out, err = described(capsys, *argv)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert message in err

"""`tessera describe` prints, draws and writes as JSON what a model is."""

import json
import pathlib
import re

import pytest
from PIL import Image

from research import cli
from research.core import config as configs
from research.inspection import parameter_summary
from research.inspection.report import report_lines
from research.models.config import LayerConfig
from tests.models.variants import VARIANTS
from tests.recipes import runs
from tests.tiny import tiny_config

MODELS = runs.ROOT / "configs" / "model"


def described(capsys, *argv: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["describe", *argv])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_config_and_workdir_are_described_and_drawn(
    tiny: pathlib.Path, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    status, out, err = described(capsys, f"--config={tiny}", "--config.model.num_layers=5")
    assert status == 0
    sizes = {
        "structure": "decoder-only",
        "layers": "5",
        "width": "16",
        "query heads": "4",
        "KV heads": "2",
        "head dim": "4",
        "vocabulary": "384",
    }
    for field, text in sizes.items():
        assert re.search(rf"^{field} +{text}$", out, re.MULTILINE), field
    assert re.search(r"layers 0–4 +5 × ", out)
    assert f"describe/{tiny.stem}/attention.png" in err
    drawn = tmp_path / "describe" / tiny.stem / "attention.png"
    with Image.open(drawn) as image:
        assert image.size[0] > 500
        assert len(image.convert("RGB").getcolors(1 << 20)) > 4
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "config.json").write_text(configs.to_json({"model": VARIANTS["encoder-decoder"]}))
    status, out, _ = described(capsys, f"--workdir={workdir}")
    assert status == 0
    assert re.search(r"^structure +encoder-decoder$", out, re.MULTILINE)
    assert re.search(r"^layers +3 in the encoder, 2 in the decoder$", out, re.MULTILINE)
    assert (workdir / "plots" / "attention.png").is_file()


def test_json_is_the_only_output_and_holds_config_parameters_and_masks(tmp_path, capsys):
    model = tiny_config(num_layers=3, pattern=(LayerConfig(window=8), LayerConfig()))
    (tmp_path / "config.json").write_text(configs.to_json({"model": model}))
    status, out, _ = described(capsys, f"--workdir={tmp_path}", "--json")
    assert status == 0
    found = json.loads(out)
    assert found.keys() == {"config", "summary", "costs", "parameters", "masks"}
    assert found["config"] == json.loads(configs.to_json(model))
    assert found["summary"]["query heads"] == "4"
    count = parameter_summary.parameter_tree(model).count
    assert found["costs"]["parameters"] == found["parameters"]["count"] == count
    assert found["costs"]["cache_bytes"] == 2 * 2 * 3 * 2 * 4  # bytes, k and v, layers, heads, dim
    window = "causal attention, sliding window of 8 tokens (itself included)"
    assert found["masks"] == [
        {"stack": "", "layers": [0, 2], "window": 8, "text": window},
        {"stack": "", "layers": [1], "window": None, "text": "causal attention"},
    ]
    assert (tmp_path / "plots" / "attention.png").is_file()


@pytest.mark.fast_cases(
    "windows", "sinks", "shared experts", "latent", "encoder-decoder", "encoder"
)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_a_report(name: str):
    assert all(
        line == line.rstrip() or line[0] in "├└│ " for line in report_lines(VARIANTS[name]) if line
    )


def test_mistakes_get_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    preset = f"--config={MODELS}/llama.py"
    wrong = {
        (f"--config={MODELS}/lama.py",): "is not a file",
        (f"--config={MODELS}/llama.py:3-8c",): "'3-8b'",
        (preset, "--config.num_layer=3"): "Did you mean 'num_layers'?",
        (preset, "--config.model.num_layers=3"): "say --config.num_layers",
        (preset, "--length=15"): "--length = 15 must lie in [16, ",
        (preset, "--length=999999"): "max_length = 131072",
        (preset, f"--out={tmp_path}/file/here"): "cannot be written",
        (preset, f"--workdir={tmp_path}"): "either --config or --workdir",
        (): "either --config or --workdir",
        (f"--workdir={tmp_path}",): "is not a workdir",
        (f"--workdir={tmp_path}", "--config.num_layers=3"): "--config.num_layers",
    }
    for argv, message in wrong.items():
        status, out, err = described(capsys, *argv)
        assert (status, out, err.count("\n")) == (2, "", 1), err
        assert message in err

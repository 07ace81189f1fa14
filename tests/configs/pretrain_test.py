"""Training configs bind whole."""

import pathlib
import re

import pytest

from configs.model import gpt2
from research.recipes.experiment import load_experiment

FOLDER = pathlib.Path(__file__).parents[2] / "configs" / "pretrain"


@pytest.mark.parametrize(
    "path", [path for path in sorted(FOLDER.glob("*.py")) if path.stem != "__init__"], ids=str
)
def test_config_binds_and_says_what_it_cost(path: pathlib.Path):
    load_experiment(str(path), [])
    header = path.read_text().partition('"""\n\nimport')[0]
    assert "tessera train --config=configs/pretrain/" in header
    pages = re.findall(r"\bdocs/[\w-]+\.md|\bREADME\b", header)
    assert "unmeasured" in header or pages
    assert all((FOLDER.parents[1] / page.replace("README", "README.md")).exists() for page in pages)


@pytest.mark.parametrize("size", gpt2.SIZES)
def test_gpt2_takes_every_size_of_the_preset(size: str):
    config = load_experiment(f"{FOLDER / 'gpt2.py'}:{size}", [])
    assert config.model.num_layers == gpt2.SIZES[size][0]

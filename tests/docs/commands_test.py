"""Every command on the site runs, and every link leads somewhere.

The commands of a page run in order in a folder of its own, with the model and the corpus of a
config of `configs/pretrain` made small.
"""

import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest

from research import cli
from research.recipes import time_budget
from tests.recipes.runs import write_corpus

ROOT = pathlib.Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SMALL = {
    "model.num_layers": 1,
    "model.embed_dim": 32,
    "model.attention.num_heads": 2,
    "model.attention.num_kv_heads": 2,
    "model.attention.head_dim": 16,
    "model.mlp.hidden_dim": 32,
    "train.sequence_length": 64,
    "train.eval_batches": 1,
    "data.tokenizer.kind": "bytes",
    "data.sources.0.kind": "text",
    "data.sources.0.path": "corpus",
}
# What a page waits for, and what is enough here.
SHORT = {
    "--config.train.steps=200": "--config.train.steps=20",
    "--time-budget=120": "--time-budget=30",
}


def commands(text: str) -> list[str]:
    """Returns the lines of the blocks that are marked as `bash`; others need what is not here."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines() if line.strip()]


def made_small(words: list[str]) -> list[str]:
    """Returns the words of a command with a small model, but for what it chooses itself, and with
    fewer steps.
    """
    if not any("configs/pretrain/" in word for word in words):
        return words
    given = {word.removeprefix("--config.").partition("=")[0] for word in words}
    small = dict(SMALL)
    if "data.sources.0.path" not in given:  # a source of the page holds out enough by itself
        small["data.sources.0.heldout_fraction"] = 0.2
    added = [f"--config.{name}={value}" for name, value in small.items() if name not in given]
    return [SHORT.get(word, word) for word in words] + added


def run(command: str) -> None:
    words = shlex.split(command)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]  # these tests have eight devices already
    if words[:2] == ["pip", "install"]:
        return
    if words[0] == "tessera":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", words)
            try:
                status = cli.main(made_small(words[1:]))
            except SystemExit as stop:  # --help
                status = stop.code
        # `doctor` says with 1 that this machine lacks something.
        assert not status or (words[1] == "doctor" and status == 1), command
        return
    if words[0] == "python":
        words[0] = sys.executable
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    subprocess.run(made_small(words), check=True, env=environment, timeout=500)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page.read_text())], ids=lambda page: page.stem
)
def test_every_command_of_a_page_runs(
    page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, own_cache: None
):
    for name in ("configs", "launch"):
        (tmp_path / name).symlink_to(ROOT / name)
    write_corpus(tmp_path / "corpus")
    monkeypatch.chdir(tmp_path)
    # A time budget counts from the start of the process, which here is that of all tests.
    monkeypatch.setattr(time_budget, "elapsed", lambda: 0.0)
    for command in commands(page.read_text()):
        run(command)


def test_a_page_s_commands_are_those_of_its_bash_blocks():
    text = "```bash\na b\n\nc\n```\n```\nd\n```\n```python\ne\n```\n"
    assert commands(text) == ["a b", "c"]


def test_what_a_command_chooses_itself_is_not_made_small():
    words = ["train", "--config=configs/pretrain/a.py", "--config.model.num_layers=7"]
    small = made_small(words)
    assert small[:3] == words
    long = ["train", "--config=configs/pretrain/a.py", "--config.train.steps=200"]
    assert made_small(long)[2] == "--config.train.steps=20"
    assert "--config.model.embed_dim=32" in small
    assert sum(word.startswith("--config.model.num_layers") for word in small) == 1
    assert made_small(["describe", "--config=configs/model/a.py"])[-1].endswith("a.py")


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "AGENTS.md", "CHANGELOG.md"])
def test_links_lead_to_files(name: str):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text())
    missing = [link for link in links if "://" not in link and not (ROOT / link).exists()]
    assert not missing


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 7000


@pytest.mark.live
def test_the_site_builds_strictly(tmp_path: pathlib.Path):
    pytest.importorskip("material", reason="needs mkdocs-material: pip install -e '.[docs]'")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "symptoms" / "index.html").exists()

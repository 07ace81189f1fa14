"""The bench of two commits: which rows it has, which side a ratio favours, and what it refuses."""

import argparse
import contextlib
import json
import pathlib
import subprocess

import pytest

from research.bench import commits
from research.core.errors import UserError


def arguments(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    commits.add_arguments(parser)
    return parser.parse_args(["--before=HEAD", *flags])


@pytest.fixture
def checkout(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """A repository of one file, in the place of this one."""
    (tmp_path / "file").write_text("of the commit")
    for command in (
        ["init", "-q"],
        ["add", "file"],
        ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "a"],
    ):
        subprocess.run(["git", "-C", tmp_path, *command], check=True)
    monkeypatch.setattr(commits, "ROOT", tmp_path)
    return tmp_path


def test_a_slower_side_has_a_ratio_below_one(checkout: pathlib.Path, tmp_path: pathlib.Path, monkeypatch):
    @contextlib.contextmanager
    def worker(command: list[str], root: pathlib.Path):
        yield lambda count: 4.0 if root == checkout else 2.0

    monkeypatch.setattr(commits, "worker", worker)
    commits.main(arguments("--only=train,family gpt2", "--rounds=2", f"--json={tmp_path / 'out.json'}"))
    assert json.loads((tmp_path / "out.json").read_text()) == {"train": [0.5, 0.5], "family gpt2": [0.5, 0.5]}


def test_figures_are_read_from_what_a_bench_prints(checkout: pathlib.Path, monkeypatch):
    said = "  loader  9.00 (8 to 9) M tokens a second\n  loader  {} (1 to 2) M tokens a core-second\n"

    def run(command, cwd=None, **options):
        figure = "3.00" if cwd == checkout else "2.00"
        return subprocess.CompletedProcess(command, 0, stdout=said.format(figure))

    monkeypatch.setattr(commits.subprocess, "run", run)
    assert commits._bench_ratios("loader", pathlib.Path("before"), 1) == [1.5]


def test_the_files_are_those_of_the_commit(checkout: pathlib.Path):
    (checkout / "file").write_text("changed since")
    with commits._checkout("HEAD") as before:
        assert (before / "file").read_text() == "of the commit"
    assert not before.exists()


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--rounds=0", "--rounds = 0 must be at least 1"),
        ("--only=trian", "--only = 'trian' is the beginning of no row. Did you mean 'train'?"),
        ("--before=nowhere", "--before = 'nowhere' is no commit of this checkout"),
    ],
)
def test_mistakes_are_one_line(checkout: pathlib.Path, flag: str, said: str):
    with pytest.raises(UserError, match=f"^{said.replace('?', '[?]')}"):
        commits.main(arguments(flag))

"""The bench of two commits: which rows it has, which side a ratio favours, and what it refuses."""

import argparse
import contextlib
import json
import pathlib
import subprocess

import pytest

from research.bench import commits, report
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


def test_a_slower_side_has_a_ratio_below_one(
    checkout: pathlib.Path, tmp_path: pathlib.Path, monkeypatch
):
    @contextlib.contextmanager
    def worker(command: list[str], root: pathlib.Path):
        yield lambda count: 4.0 if root == checkout else 2.0

    monkeypatch.setattr(commits, "worker", worker)
    commits.main(
        arguments("--only=train,family gpt2", "--rounds=2", f"--json={tmp_path / 'out.json'}")
    )
    figures = json.loads((tmp_path / "out.json").read_text())["figures"]
    assert list(figures) == ["train", "family gpt2"]
    for fields in figures.values():
        assert report.Figure(**fields).ratios() == {"before": [0.5, 0.5]}


def test_the_loader_s_figure_is_read_from_what_its_bench_prints_now_and_before(
    checkout: pathlib.Path, monkeypatch
):
    now = (
        "  loader       9.00 (8.00 to 9.00) M tokens/s\n  loader       3.00 (1.00 to 4.00) M "
        "tokens/core-second\n"
    )
    then = (
        "  loader  9.00 (8 to 9) M tokens a second\n  loader  2.00 (1 to 2) M tokens a "
        "core-second\n"
    )
    monkeypatch.setattr(commits, "run", lambda command, root: now if root == checkout else then)
    ((name, figure),) = commits._measure(
        "loader", {"now": checkout, "before": pathlib.Path("before")}, 1
    )
    assert (name, figure.ratios()) == ("loader", {"before": [1.5]})


@pytest.mark.parametrize("has_room", [True, False])
def test_conversions_alternate_their_order_with_files_in_memory(
    checkout: pathlib.Path, monkeypatch, has_room: bool
):
    asked, before = [], pathlib.Path("before")

    def run_side(
        folder: pathlib.Path, way: str, module: str, root: pathlib.Path
    ) -> dict[str, float]:
        asked.append((root, way))
        assert folder.is_relative_to(commits.MEMORY) == has_room
        return {"seconds": 1.0 if root == checkout else 2.0}

    monkeypatch.setattr(commits, "MEMORY", checkout if has_room else checkout / "nowhere")
    monkeypatch.setattr(commits, "CONVERTED", 1)
    monkeypatch.setattr(commits.convert, "make_folder", lambda *_: 3_000_000)
    monkeypatch.setattr(commits.convert, "run_side", run_side)
    figures = dict(commits._measure("convert", {"now": checkout, "before": before}, 1))
    assert asked == [
        (root, way) for root in (checkout, before, before, checkout) for way in ("in", "out")
    ]
    for way in ("in", "out"):
        assert figures[f"convert {way}"].rounds == {"now": [3.0], "before": [1.5]}
        assert figures[f"convert {way}"].note == (
            "files in memory" if has_room else "files on the disk"
        )


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

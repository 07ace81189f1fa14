"""Samples are printed, kept, and the same for the same seed."""

import shutil

import pytest

from research import cli
from tests.recipes.fixtures import Unbroken


def test_samples_are_printed_and_kept(unbroken: Unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    argv = ["sample", f"--workdir={workdir}", "--prompt=the cat", "--prompt=12", "--max_tokens=8"]
    assert cli.main(argv) == 0
    first = capsys.readouterr().out
    assert first.startswith("the cat")
    assert "\n\n12" in first
    assert cli.main(argv) == 0
    assert capsys.readouterr().out == first
    assert cli.main([*argv, "--seed=7"]) == 0
    assert capsys.readouterr().out != first
    kept = (workdir / "samples.txt").read_text(encoding="utf-8")
    assert kept.count("step 12, SamplingConfig(max_tokens=8") == 3
    assert kept.count(first) == 2


@pytest.mark.fast_cases("flags0")
@pytest.mark.parametrize("flags", [["--temperature=0.8"], ["--num_beams=3"]])
def test_pages_give_the_samples_of_the_dense_cache(
    flags: list[str], unbroken: Unbroken, tmp_path, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    prompts = ["--prompt=the cat", "--prompt=12 12 12 12 12 12 12 12 12", "--max_tokens=12"]
    texts = []
    for cache in ("dense", "paged"):
        assert (
            cli.main(["sample", f"--workdir={workdir}", *prompts, *flags, f"--cache={cache}"]) == 0
        )
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_empty_prompt_begins_a_document(unbroken: Unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    assert (
        cli.main(
            ["sample", f"--workdir={workdir}", "--prompt=", "--max_tokens=4", "--temperature=0"]
        )
        == 0
    )
    assert capsys.readouterr().out.strip()


def test_samples_that_cannot_be_kept_are_printed_all_the_same(unbroken: Unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    (workdir / "samples.txt").mkdir()
    assert cli.main(["sample", f"--workdir={workdir}", "--prompt=the", "--max_tokens=4"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("the")
    assert "samples.txt cannot be written: Is a directory" in err


def test_beams_are_searched_where_there_is_more_than_one(unbroken: Unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    argv = [
        "sample",
        f"--workdir={workdir}",
        "--prompt=the",
        "--prompt=cat",
        "--max_tokens=8",
        "--num_beams=3",
    ]
    assert (
        cli.main([*argv, "--forced_prefix= sat", "--length_penalty=0.5", "--no_repeat_ngram=3"])
        == 0
    )
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.startswith("the sat")
    assert second.startswith("cat sat")
    assert "step 12, BeamConfig(num_beams=3" in (workdir / "samples.txt").read_text(
        encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (
            ["--num_beams=3", "--temperature=0.5"],
            "--temperature = 0.5 draws, and num_beams = 3 searches.",
        ),
        (["--num_beams=3", "--stop=x"], "--stop = ('x',) draws, and num_beams = 3 searches."),
        (["--length_penalty=2"], "--length_penalty = 2.0 needs num_beams above 1."),
        (["--num_beams=0"], "--num_beams = 0 must be at least 1."),
        (["--cache=pages"], "--cache = 'pages' is not one of dense, paged."),
    ],
)
def test_flags_that_do_not_go_together_are_refused_in_a_line(flags: list[str], said: str, capsys):
    assert cli.main(["sample", "--workdir=nowhere", *flags]) == 2
    assert capsys.readouterr().err == f"tessera: error: {said}\n"

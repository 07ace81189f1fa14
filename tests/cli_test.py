"""Every mistake is answered by one line and status 2, and nothing is harmed by it."""

import errno
import fcntl
import os
import pathlib
import shutil

import pytest

import research
from research import cli
from research.core.errors import UserError
from research.recipes.experiment import load_experiment
from research.recipes.inputs import prepare_data
from tests.recipes import runs
from tests.recipes.fixtures import Unbroken


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs a command that must fail with status 2 and returns its line; what a run says of its data
    is no matter.
    """
    capsys.readouterr()
    status = cli.main(argv)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith(("data: ", "model: "))]
    assert (status, out) == (2, ""), err
    assert len(lines) == 1, err
    assert lines[0].startswith("tessera: error: ")
    return lines[0].removeprefix("tessera: error: ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.step=5", "train.step is not a config field. Did you mean 'steps'?"),
        ("optim.lerning_rate=5", "Did you mean 'learning_rate'?"),
        ("learning_rate=5", "Did you mean 'optim.learning_rate'?"),
        ("train.steps=many", "train.steps = 'many' must be a whole number"),
        ("train.steps=1.5", "train.steps = '1.5' must be a whole number"),
        ("train.steps=0", "train.steps = 0 must be at least 1"),
        ("train.steps.x=1", "train.steps"),
        ("train=1", "train = '1' must be a group of fields"),
        ("train.seed=-1", "train.seed = -1 must lie in"),
        ("train.seed=99999999999", "train.seed = 99999999999 must lie in"),
        ("optim.learning_rate=nan", "optim.learning_rate = 'nan' must be a finite number"),
        ("optim.name=adam", "Did you mean 'adamw'?"),
        ("mesh.data=3", "mesh.data = 3 does not fit 8 devices"),
        ("mesh.tensor=3", "mesh.tensor = 3 does not fit 8 devices (data -1 × tensor 3)"),
        ("mesh.tensor=8", "mesh.tensor = 8 does not divide"),
        ("model.attention.num_kv_heads=3", "num_kv_heads = 3 does not divide num_heads = 4"),
        ("model.vocab_size=100", "model.vocab_size = 100 is below the tokenizer's"),
        (
            "train.sequence_length=65",
            "train.sequence_length = 65 is longer than model.max_length = 64",
        ),
        ("train.batch_size=9", "train.batch_size = 9 is not a multiple of"),
        ("optim.schedule.warmup_steps=99", "warm-up and decay take 99 steps, but train.steps = 12"),
        ("checkpoint.keep=0", "checkpoint.keep = 0 must be at least 1"),
        ("data.sources.0.path=/nowhere", "data.sources.0.path = '/nowhere' matches no file"),
        ("data.sources.0.heldout_fraction=0", "no document is held out"),
        ("model.param_dtype=bfloat16", "optim.ema_decay = 0.9 needs model.param_dtype = 'float32'"),
        ("data.sources.1.path=x", "not an index below 1"),
    ],
)
def test_mistake_in_the_config_is_one_line_and_leaves_nothing(
    tiny: pathlib.Path, tmp_path, change, said, capsys
):
    workdir = tmp_path / "run"
    assert said in refused(
        capsys, "train", f"--config={tiny}", f"--workdir={workdir}", f"--config.{change}"
    )
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.seed=1", "belongs to another config: train.seed is"),
        ("model.num_layers=3", "belongs to another config: model.num_layers is"),
        ("optim.learning_rate=1", "belongs to another config: optim.learning_rate is"),
    ],
)
def test_workdir_of_another_config_is_refused_unchanged(unbroken: Unbroken, change, said, capsys):
    before = runs.contents(unbroken.workdir)
    arguments = (
        f"--config={unbroken.config}",
        f"--workdir={unbroken.workdir}",
        f"--config.{change}",
    )
    assert said in refused(capsys, "train", *arguments)
    assert runs.contents(unbroken.workdir) == before


def test_checkpoint_of_another_architecture_is_named_and_left(unbroken: Unbroken, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(unbroken.workdir, workdir)
    config = (workdir / "config.json").read_text()
    (workdir / "config.json").write_text(config.replace('"hidden_dim": 32', '"hidden_dim": 48'))
    before = runs.contents(workdir)
    arguments = (
        f"--config={unbroken.config}",
        f"--workdir={workdir}",
        "--config.model.mlp.hidden_dim=48",
    )
    assert "is of another architecture: " in refused(capsys, "train", *arguments)
    assert "is of another architecture: " in refused(
        capsys, "sample", f"--workdir={workdir}", "--prompt=a"
    )
    assert runs.contents(workdir) == before


BAD_FILES = {
    "syntax": ("def get_config(:\n", "line 1"),
    "raises": ("def get_config():\n    return {}['x']\n", "line 2: KeyError: 'x'"),
    "raises_on_import": ("import json\n\n1 / 0\n", "line 3: ZeroDivisionError"),
    "missing_module": ("import no_such_module\n", "no_such_module"),
    "no_function": ("x = 1\n", "has no get_config()"),
    "other_result": (
        "def get_config():\n    return {}\n",
        "must return an ml_collections.ConfigDict",
    ),
    "bytes": ("\udcff", "cannot be run"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_config_file_that_cannot_be_run_is_named_with_its_line(tmp_path, name, capsys):
    content, said = BAD_FILES[name]
    path = tmp_path / f"{name}.py"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    line = refused(capsys, "train", f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert str(path) in line
    assert said in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("trian",), "'trian' is not a verb. Did you mean 'train'?"),
        (("fly",), "'fly' is not a verb. Known: train, evaluate, sample,"),
        (("train",), "--config, --workdir"),
        (
            ("train", "--config=nowhere.py", "--workdir=run"),
            "--config = 'nowhere.py' is not a file",
        ),
        (("train", "--config=.", "--workdir=run"), "--config = '.' is not a file"),
        (("train", "--config=a.py", "--workdir=run", "--confg=b"), "Did you mean '--config'?"),
        (("sample", "--workdir=run", "--config.train.steps=1"), "sample reads no config"),
        (("train", "--config=a.py", "--workdir=run", "--config.train.steps"), "needs a value"),
        (("sample", "--workdir=nowhere", "--prompt=a"), "--workdir = nowhere is not a workdir"),
        (("sample", "--workdir=nowhere", "--top_p=x"), "--top_p"),
        (
            ("sample", "--workdir=s3://bucket/run"),
            "--workdir = 's3://bucket/run' is an address of an unknown kind",
        ),
        (
            ("doctor", "--workdir=s3://bucket/run"),
            "--workdir = 's3://bucket/run' is an address of an unknown kind",
        ),
        (("convert", "--from=hf://model", "--to=nowhere"), "--from = 'hf://model' is an address"),
        (
            ("convert", "--from=nowhere", "--to=s3://bucket/run"),
            "--to = 's3://bucket/run' is an address",
        ),
        (("bench", "nothing"), "nothing"),
    ],
)
def test_mistake_on_the_command_line_is_one_line(argv, said, capsys):
    assert said in refused(capsys, *argv)


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--top_p=2", "top_p = 2.0 must lie in (0, 1]"),
        ("--temperature=-1", "temperature = -1.0 must not be below 0"),
        ("--temperature=nan", "temperature = nan must"),
        ("--max_tokens=0", "max_tokens = 0 must be at least 1"),
        ("--max_tokens=100", "is more than the model's max_length = 64. Use at most"),
        ("--seed=-1", "seed = -1 must lie in"),
        ("--seed=18446744073709551616", "seed = 18446744073709551616 must lie in"),
        ("--stop=", "stop = ('',) must hold no empty string"),
        ("--prompt=" + 70 * "x", "max_length = 64"),
        ("--prompt=\udcff", "not Unicode"),
    ],
)
def test_sample_refuses_what_cannot_be(unbroken: Unbroken, flag, said, capsys):
    before = runs.contents(unbroken.workdir)
    assert said in refused(capsys, "sample", f"--workdir={unbroken.workdir}", "--prompt=a", flag)
    assert runs.contents(unbroken.workdir) == before


def test_a_message_without_end_is_cut(capsys):
    assert cli.main(["sample", "--workdir=" + "x" * 100_000]) == 2
    err = capsys.readouterr().err
    assert err.startswith("tessera: error: --workdir = xxx")
    assert err.count("\n") == 1
    assert len(err) < 4100


def test_sample_without_a_checkpoint_says_so(unbroken: Unbroken, tmp_path, capsys):
    (tmp_path / "config.json").write_text((unbroken.workdir / "config.json").read_text())
    assert "has no checkpoint" in refused(capsys, "sample", f"--workdir={tmp_path}", "--prompt=a")
    (tmp_path / "config.json").write_text('{"train": {}}')
    assert "is not a workdir" in refused(capsys, "sample", f"--workdir={tmp_path}", "--prompt=a")


def test_workdir_that_cannot_be_is_refused(tiny: pathlib.Path, tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("mine")
    for workdir in (file, file / "below", pathlib.Path("/proc/run")):
        said = refused(capsys, "train", f"--config={tiny}", f"--workdir={workdir}")
        assert said.startswith(f"--workdir = {workdir} cannot be written: ")
    assert file.read_text() == "mine"


def test_address_of_an_unknown_kind_is_no_workdir(
    tiny: pathlib.Path, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    before = runs.contents(tmp_path)
    said = refused(capsys, "train", f"--config={tiny}", "--workdir=s3://bucket/run")
    assert said.startswith("--workdir = 's3://bucket/run' is an address of an unknown kind")
    assert runs.contents(tmp_path) == before


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (("train", "--config={tiny}", "--workdir="), "--workdir"),
        (("train", "--config={tiny}", "--workdir=", "--time-budget=9"), "--workdir"),
        (("evaluate", "--workdir="), "--workdir"),
        (("sample", "--workdir="), "--workdir"),
        (("sample", "--workdir={folder}", "--messages="), "--messages"),
        (("doctor", "--workdir="), "--workdir"),
        (("describe", "--workdir="), "--workdir"),
        (("describe", "--config={tiny}", "--out="), "--out"),
        (("convert", "--from=", "--to={folder}/new"), "--from"),
        (("convert", "--from={folder}", "--to="), "--to"),
    ],
)
def test_an_empty_path_is_not_the_current_folder(
    argv, flag, tiny: pathlib.Path, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    said = refused(capsys, *(text.format(tiny=tiny, folder=tmp_path) for text in argv))
    assert said == f"{flag} = '' must not be empty."
    assert runs.contents(tmp_path) == {}


def test_second_run_in_a_workdir_is_refused_and_names_the_first(
    tiny: pathlib.Path, tmp_path, capsys
):
    workdir = tmp_path / "run"
    workdir.mkdir()
    with (workdir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write("4711")
        lock.flush()
        said = refused(capsys, "train", f"--config={tiny}", f"--workdir={workdir}")
        assert said == f"--workdir = {workdir} is in use: process 4711 trains there."
    assert [path.name for path in workdir.iterdir()] == [".lock"]


def test_filesystem_without_locks_is_a_warning(tiny: pathlib.Path, tmp_path, monkeypatch, caplog):
    def flock(file: object, operation: int) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", flock)
    runs.run(
        tiny,
        tmp_path / "run",
        train__steps=1,
        train__eval_batches=1,
        optim__schedule__warmup_steps=0,
    )
    assert "nothing keeps a second run out" in caplog.text


CORPORA = {
    "empty_folder": ("text", None, "matches no file"),
    "empty_text": ("text", b"", "holds no text"),
    "bad_utf8": ("text", b"good\nb\xffd", "corpus.txt:2: bad UTF-8"),
    "broken_json": ("jsonl", b'{"text": "a"}\n{"text": \n', "corpus.txt:2: broken JSON"),
    "no_field": ("jsonl", b'{"body": "a"}\n', "corpus.txt:1: no field 'text'"),
}


@pytest.mark.parametrize("name", CORPORA)
def test_bad_corpus_is_named_and_leaves_nothing(tiny: pathlib.Path, tmp_path, name, capsys):
    kind, content, said = CORPORA[name]
    folder = tmp_path / "corpus"
    folder.mkdir()
    if content is not None:
        (folder / "corpus.txt").write_bytes(content)
    flags = runs.flags({"data.sources.0.kind": kind, "data.sources.0.path": folder})
    line = refused(capsys, "train", f"--config={tiny}", f"--workdir={tmp_path / 'run'}", *flags)
    assert said in line
    assert "sources.0" in line
    assert not (tmp_path / "run").exists()


def test_bad_records_below_the_set_rate_are_counted_and_named(tiny: pathlib.Path, tmp_path, capsys):
    lines = [f'{{"text": "the cat sat on mat {i}"}}' for i in range(60)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(["{", *lines]))
    sources = {"data.sources.0.kind": "jsonl", "data.sources.0.path": tmp_path / "corpus.jsonl"}
    changes = runs.flags({**sources, "data.sources.0.max_bad_fraction": 0.1})
    assert cli.main(["data", f"--config={tiny}", *changes]) == 0
    assert "1 skipped, first: " in capsys.readouterr().err


def test_config_imports_its_neighbours_from_any_folder(
    tmp_path, tiny: pathlib.Path, monkeypatch, capsys
):
    package = tmp_path / "project" / "experiments"
    (package / "model").mkdir(parents=True)
    for folder in (package, package / "model"):
        (folder / "__init__.py").write_text("")
    (package / "model" / "small.py").write_text("STEPS = 0\n")
    (package / "mine.py").write_text(
        tiny.read_text() + "\nfrom experiments.model.small import STEPS\n"
    )
    monkeypatch.chdir(tmp_path / "project" / "experiments" / "model")
    assert "train.steps = 0" in refused(
        capsys,
        "train",
        "--config=../mine.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.train.steps=0",
    )


def test_folder_of_caches_that_cannot_be_written_is_one_line(
    tiny: pathlib.Path, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TESSERA_CACHE", "/proc/cache")
    assert "/proc/cache" in refused(
        capsys, "train", f"--config={tiny}", f"--workdir={tmp_path / 'run'}"
    )
    assert not (tmp_path / "run").exists()


def test_a_library_names_the_argument_and_the_command_line_the_flag(tmp_path, capsys):
    nowhere = tmp_path / "nowhere"
    with pytest.raises(UserError) as caught:
        research.load(nowhere)
    assert (caught.value.field, caught.value.value) == ("workdir", nowhere)
    assert str(caught.value).startswith(f"workdir = {nowhere} is not a workdir: ")
    assert refused(capsys, "sample", f"--workdir={nowhere}").startswith(
        f"--workdir = {nowhere} is not a workdir: "
    )

    with pytest.raises(UserError) as caught:
        research.convert(nowhere, tmp_path / "out")
    assert caught.value.field == "source"
    said = refused(capsys, "convert", f"--from={nowhere}", f"--to={tmp_path / 'out'}")
    assert said == f"--from = {str(caught.value).removeprefix('source = ')}"


def test_what_a_verb_draws_with_is_named_as_a_flag(unbroken: Unbroken, capsys):
    assert refused(
        capsys, "sample", f"--workdir={unbroken.workdir}", "--prompt=a", "--top_p=2"
    ).startswith("--top_p = ")
    said = refused(capsys, "sample", f"--workdir={unbroken.workdir}", f"--prompt={70 * 'x'}")
    assert said.startswith("--prompt: a prompt of 7")


def test_a_mistake_in_a_config_is_data(tiny: pathlib.Path):
    with pytest.raises(UserError) as caught:
        load_experiment(str(tiny), [("checkpoint.keep", "0")])
    error = caught.value
    assert (error.origin, error.field, error.value) == (str(tiny), "checkpoint.keep", 0)
    assert str(error).startswith(f"{tiny}: checkpoint.keep = 0 must be at least 1")
    with pytest.raises(UserError) as caught:
        prepare_data(load_experiment(str(tiny), [("data.sources.0.path", "/nowhere")]))
    assert (caught.value.field, caught.value.value) == ("data.sources.0.path", "/nowhere")

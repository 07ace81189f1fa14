"""A workdir in a bucket is like any other: claims about the verbs with `gs://` addresses, against a
local emulator.
"""

import importlib.util
import logging

import numpy as np
import pytest

from research import cli
from research.core.errors import UserError
from research.recipes.load import load
from research.storage.paths import as_path
from research.training.metrics import read_metrics
from tests.recipes import runs


def _names(folder):
    return sorted(path.name for path in as_path(folder).iterdir())


def _losses(workdir):
    return [
        (row["step"], row["train/loss"])
        for row in read_metrics(as_path(workdir))
        if "train/loss" in row
    ]


def test_a_run_in_a_bucket_is_the_run_on_a_disk_and_resumes_bit_for_bit(
    unbroken, bucket, caplog, monkeypatch
):
    workdir = f"{bucket}/run"
    with caplog.at_level(logging.INFO, "tessera"):
        runs.run_until(6, unbroken.config, as_path(workdir))
        stopped_at = max(_names(f"{workdir}/checkpoints"), key=int)
        assert 6 <= int(stopped_at) < 12
        assert {step for step, _ in _losses(workdir)} == set(range(1, int(stopped_at) + 1))
        state = runs.run(unbroken.config, as_path(workdir))
    assert "a bucket has no locks: nothing keeps a second run out" in caplog.text
    assert f"from step {stopped_at}" in caplog.text
    runs.assert_same_state(state, unbroken.state)
    assert _losses(workdir) == _losses(unbroken.workdir)
    want = ["checkpoints", "config.json", "metrics.jsonl", "plots", "tensorboard", "tokenizer"]
    assert _names(workdir) == want
    assert _names(f"{workdir}/checkpoints") == sorted(
        path.name for path in (unbroken.workdir / "checkpoints").iterdir()
    )
    assert (as_path(workdir) / "plots" / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert len(_names(f"{workdir}/tensorboard")) == 2


@pytest.fixture(scope="module")
def trained(unbroken, emulator):
    """A finished run in a bucket."""
    workdir = f"{emulator}/trained"
    runs.run(unbroken.config, as_path(workdir))
    return workdir


def test_sample_reads_a_bucket_and_keeps_its_text_there(trained, unbroken, capsys):
    for _ in range(2):
        assert (
            cli.main(
                [
                    "sample",
                    f"--workdir={trained}",
                    "--prompt=the ",
                    "--max_tokens=4",
                    "--temperature=0",
                ]
            )
            == 0
        )
    capsys.readouterr()
    text = (as_path(trained) / "samples.txt").read_text()
    assert text.count("step 12, ") == 2
    (want,) = load(unbroken.workdir).generate(["the "], max_tokens=4, temperature=0.0)
    assert text.count(f"the {want.text}\n\n") == 2


def test_convert_takes_a_workdir_out_of_a_bucket_and_into_one(trained, bucket, tmp_path):
    assert cli.main(["convert", f"--from={trained}", f"--to={tmp_path / 'local'}"]) == 0
    assert cli.main(["convert", f"--from={tmp_path / 'local'}", f"--to={bucket}/again"]) == 0
    assert cli.main(["convert", f"--from={trained}", f"--to={bucket}/hf", "--format=hf"]) == 0
    models = [load(folder) for folder in (trained, tmp_path / "local", f"{bucket}/again")]
    tokens = np.arange(10)[None]
    first, *others = [np.asarray(model.logits(tokens)) for model in models]
    for other in others:
        np.testing.assert_array_equal(other, first)
    assert "config.json" in _names(f"{bucket}/hf")
    assert "model.safetensors" in _names(f"{bucket}/hf")


def test_a_conversion_that_fails_leaves_nothing_in_a_bucket(trained, bucket, tmp_path, capsys):
    assert (
        cli.main(["convert", f"--from={trained}", f"--to={bucket}/x", f"--tokenizer={tmp_path}"])
        == 2
    )
    assert not as_path(f"{bucket}/x").exists()
    assert cli.main(["convert", f"--from={trained}", f"--to={trained}"]) == 2
    assert "exists already and is not an empty folder" in capsys.readouterr().err


def test_describe_and_doctor_take_a_bucket(trained, capsys):
    assert cli.main(["describe", f"--workdir={trained}"]) == 0
    assert (as_path(trained) / "plots" / "attention.png").read_bytes()[:4] == b"\x89PNG"
    cli.main(["doctor", f"--workdir={trained}"])
    assert f"ok    workdir      {trained} can be written" in capsys.readouterr().out


def test_a_checkpoint_that_is_being_written_in_a_bucket_is_none(unbroken, bucket):
    """What a killed run leaves there: arrays and manifest, but not the file that Orbax writes
    last.
    """
    workdir = as_path(f"{bucket}/run")
    runs.run(unbroken.config, workdir)
    (workdir / "checkpoints" / "12" / "commit_success.txt").unlink()
    assert load(workdir).step == 8
    state = runs.run(unbroken.config, workdir)
    runs.assert_same_state(state, unbroken.state)


def test_another_config_is_refused_a_workdir_in_a_bucket(trained, unbroken):
    with pytest.raises(
        UserError,
        match=r"belongs to another config: optim\.learning_rate is 0\.01 there, 0\.02 here",
    ):
        runs.run(unbroken.config, as_path(trained), optim__learning_rate=0.02)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("gs://", "names no bucket. Use gs://BUCKET/FOLDER."),
        ("gs://A/run", "names no bucket"),
        ("foo://x", "is an address of an unknown kind. Use a folder, or gs://BUCKET/FOLDER."),
        ("s3://bucket/run", "is an address of an unknown kind"),
        ("gs://no-such-bucket/run", "cannot be written: there is no bucket gs://no-such-bucket"),
    ],
)
def test_a_wrong_address_is_one_line(emulator, tiny, capsys, address, message):
    assert runs.command("train", tiny, address) == 2
    error = capsys.readouterr().err
    assert message in error
    assert any(f"--workdir = {spelt} " in error for spelt in (address, repr(address)))
    assert error.count("\n") == 1 + error[: error.index("tessera: error")].count("\n")


@pytest.mark.parametrize("verb", ["train", "sample", "describe", "doctor", "convert"])
def test_a_bucket_without_its_client_is_one_line(tiny, capsys, monkeypatch, verb):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "gcsfs" else find(name, *rest),
    )
    config = [f"--config={tiny}"] if verb == "train" else []
    where = (
        ["--from=gs://bucket/run", "--to=x"] if verb == "convert" else ["--workdir=gs://bucket/run"]
    )
    assert cli.main([verb, *config, *where]) == 2
    error = capsys.readouterr().err
    assert (
        "= 'gs://bucket/run' needs the client of Google Cloud Storage: pip install -c "
        "constraints.txt -e '.[gcs]'" in error
    )
    assert error.count("\n") == 1

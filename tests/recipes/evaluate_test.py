"""`tessera evaluate`: bits per byte of a run beside gzip's and an n-gram's of the same bytes."""

import json
import math
import pathlib

import pytest

from research import cli
from research.core.config import bind
from research.data.sources import SourceConfig, documents
from research.evaluation.baselines import ByteNgram, bits_per_byte, gzip_bits
from research.recipes.evaluate import _bytes_read, _first_bytes
from research.recipes.experiment import ExperimentConfig
from research.recipes.workdir import read_config
from research.training.metrics import evaluations
from tests.recipes import runs


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("evaluate")
    config = runs.write_config(folder, runs.write_corpus(folder / "corpus"))
    runs.run(config, folder / "run")
    return folder / "run"


def test_baselines_read_the_same_bytes_as_the_run(
    workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["evaluate", f"--workdir={workdir}", "--order=3", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)

    source = SourceConfig(**read_config(workdir)["data"]["sources"][0])
    train, heldout = (
        [document.text.encode() for document in documents(source, split)]
        for split in ("train", "heldout")
    )
    assert result["documents"] == len(heldout)
    assert result["bytes"] == sum(map(len, heldout))

    run, part, ngram, packed = (row["bits_per_byte"] for row in result["bits_per_byte"])
    assert run == evaluations(workdir)[-1]["eval/bits_per_byte"]
    assert ngram == pytest.approx(bits_per_byte(ByteNgram(train, 3).bits(heldout), heldout))
    assert packed == pytest.approx(bits_per_byte(gzip_bits(heldout), heldout))
    config = bind(ExperimentConfig, read_config(workdir))
    read = _first_bytes(train, _bytes_read(config, evaluations(workdir)[-1]))
    assert part == pytest.approx(bits_per_byte(ByteNgram(read, 3).bits(heldout), heldout))
    assert part >= ngram


def test_bytes_read_are_tokens_times_bytes_a_token(workdir: pathlib.Path):
    config = bind(ExperimentConfig, read_config(workdir))
    assert (config.train.batch_size, config.train.sequence_length) == (8, 32)

    # 12 steps of 8 rows of 32 tokens of 3 bits, at 1.5 bits per byte: 2 bytes per token.
    last = {"step": 12, "eval/loss": 3 * math.log(2), "eval/bits_per_byte": 1.5}
    assert _bytes_read(config, last) == 12 * 8 * 32 * 2


def test_the_table_is_printed(workdir: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["evaluate", f"--workdir={workdir}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("held out: ")
    assert lines[1].endswith(" bits per byte  this run at step 12")
    assert lines[-1].endswith("gzip -9")


@pytest.mark.parametrize(
    ("order", "said"), [("0", "--order = 0 must lie in [1, 8]."), ("9", "--order = 9 must")]
)
def test_an_order_out_of_range_is_refused(
    workdir: pathlib.Path, order: str, said: str, capsys: pytest.CaptureFixture[str]
):
    assert cli.main(["evaluate", f"--workdir={workdir}", f"--order={order}"]) == 2
    assert said in capsys.readouterr().err


def test_a_run_without_an_evaluation_is_refused(
    workdir: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "config.json").write_text((workdir / "config.json").read_text())
    assert cli.main(["evaluate", f"--workdir={tmp_path}"]) == 2
    assert "has no evaluation in bits per byte" in capsys.readouterr().err

"""A workdir that an older commit wrote (`make_older_workdir.py` has how) is resumed, sample for
sample.
"""

import hashlib
import json
import pathlib
import shutil
import tarfile
from collections.abc import Iterator

import jax
import numpy as np
import pytest

from research.core.trees import named_leaves
from research.recipes.load import load
from research.training.metrics import read_metrics
from tests.recipes import runs

OLDER = pathlib.Path(__file__).with_name("older_workdir")
EXPECTED = json.loads((OLDER / "expected.json").read_text())


@pytest.fixture
def older(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, own_cache: None
) -> Iterator[pathlib.Path]:
    """The workdir as the older commit left it, in a folder that holds its corpus too."""
    runs.write_corpus(tmp_path / "corpus")
    shutil.copy(OLDER / "tiny.py", tmp_path)
    with tarfile.open(OLDER / "workdir.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "workdir"


@pytest.mark.thorough
def test_a_workdir_of_an_older_commit_is_resumed(
    older: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    batches = runs.record_batches(monkeypatch)
    state = runs.run(older.parent / "tiny.py", older)
    taken = [hashlib.sha256(batch).hexdigest() for batch in batches]
    assert taken == EXPECTED["batches"], "the same samples in the same order"

    rows = {
        (row["step"], "eval/loss" in row): row
        for row in read_metrics(older)
        if row["step"] > EXPECTED["step"]
    }
    assert rows
    for expected in EXPECTED["rows"]:
        row = rows[expected["step"], "eval/loss" in expected]
        for name, value in expected.items():
            name = name.replace("future_loss", "mtp_loss")  # as it was called then
            # Another processor rounds otherwise. So does the router loss, which that commit
            # multiplied with the weight of the batch and divided by it again: with it as it was,
            # all arrays below are the same bits.
            assert row[name] == pytest.approx(value, rel=1e-5, abs=1e-6), (expected["step"], name)

    found = named_leaves(jax.device_get(state))
    assert found.keys() == EXPECTED["last_norms"].keys(), "every array under its name"
    same = sum(
        hashlib.sha256(found[name].tobytes()).hexdigest() == digest
        for name, digest in EXPECTED["last"].items()
    )
    print(
        f"{same} of {len(found)} arrays are the same bits as on the processor that wrote the files"
    )
    for name, norm in EXPECTED["last_norms"].items():
        assert np.linalg.norm(found[name]) == pytest.approx(norm, rel=1e-4, abs=1e-7), name


def test_a_model_of_an_older_commit_is_loaded(older: pathlib.Path):
    model = load(older)
    assert model.step == EXPECTED["step"]
    assert np.isfinite(np.asarray(model.logits([[1, 2, 3]]))).all()

"""A run that trains some of its parameters: resumed, and read, like any other."""

import jax
import numpy as np
import pytest

from research.core.trees import named_leaves
from research.recipes.load import load
from tests.recipes import runs

FROZEN = {
    "train__steps": 6,
    "train__trainable__select": "pattern",
    "train__trainable__pattern": "layers_1/attention/",
    "train__trainable__frozen_dtype": "bfloat16",
}


@pytest.mark.thorough
def test_a_run_with_frozen_parameters_is_resumed_and_read_like_any_other(tmp_path, tiny):
    unbroken = runs.run(tiny, tmp_path / "unbroken", **FROZEN)
    runs.run_until(3, tiny, tmp_path / "run", **FROZEN)
    runs.assert_same_state(runs.run(tiny, tmp_path / "run", **FROZEN), unbroken)

    # What is frozen lies beside the checkpoints of both halves of the run, once.
    assert len(list((tmp_path / "run" / "checkpoints").glob("base-*"))) == 1
    # All parameters are read in their own type, the averaged ones of those that are trained.
    model = load(tmp_path / "run")
    found, averaged, last = (
        named_leaves(tree) for tree in (model.params, unbroken.ema, unbroken.params)
    )
    for name, leaf in found.items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(averaged[name]), err_msg=name)
        trained = name.startswith("layers_1/attention/")
        assert trained == bool(np.any(np.asarray(averaged[name]) != np.asarray(last[name]))), name
    moments = [name for name, leaf in named_leaves(unbroken.opt_state).items() if leaf.ndim]
    assert moments
    assert all("layers_1/attention/" in name for name in moments)
    assert np.isfinite(np.asarray(jax.device_get(model.logits([[1, 2, 3]])))).all()


@pytest.mark.thorough
def test_rows_of_the_embedding_that_were_trained_are_resumed(tmp_path, tiny):
    rows = {
        "train__steps": 6,
        "train__trainable__select": "embedding_rows",
        "train__trainable__rows": (32, 97, 101),
    }
    unbroken = runs.run(tiny, tmp_path / "unbroken", **rows)
    runs.run_until(4, tiny, tmp_path / "run", **rows)
    runs.assert_same_state(runs.run(tiny, tmp_path / "run", **rows), unbroken)


def test_a_pattern_that_matches_nothing_is_one_line_and_leaves_no_workdir(tmp_path, tiny, capsys):
    flags = ["--config.train.trainable.select=pattern", "--config.train.trainable.pattern=attn"]
    assert runs.command("train", tiny, tmp_path / "run", *flags) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert "train.trainable: select = 'pattern', pattern = 'attn' matches no parameter" in last
    assert "embed/embedding" in last
    assert not (tmp_path / "run").exists()

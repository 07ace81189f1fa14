"""A run begins with the parameters of another one, which may have had other positions."""

import pathlib

import numpy as np
import pytest

from research.core.errors import UserError
from research.core.trees import named_leaves
from tests.recipes import runs
from tests.recipes.fixtures import Unbroken

# So small a step that parameters are those that the run began with.
STILL = {"train__steps": 1, "optim__learning_rate": 1e-12, "optim__schedule__warmup_steps": 0}


def difference(params: object, others: object) -> float:
    ours, theirs = named_leaves(params), named_leaves(others)
    assert ours.keys() == theirs.keys()
    return max(np.abs(np.asarray(ours[name]) - np.asarray(theirs[name])).max() for name in ours)


def test_a_run_begins_with_the_averaged_parameters_of_another(unbroken: Unbroken, tmp_path):
    longer = {"model__max_length": 256, "model__position__theta": 1e6}
    state = runs.run(
        unbroken.config, tmp_path / "b", start_from=unbroken.workdir, **STILL, **longer
    )
    assert int(state.step) == 1
    assert difference(state.params, unbroken.state.ema) < 1e-6
    assert difference(state.ema, unbroken.state.ema) < 1e-6
    # The controls: the averages are not the parameters, and a run of its own begins elsewhere.
    assert difference(unbroken.state.params, unbroken.state.ema) > 1e-3
    other = runs.run(unbroken.config, tmp_path / "c", **STILL)
    assert difference(other.params, unbroken.state.ema) > 1e-2


@pytest.mark.thorough
def test_parameters_that_are_not_trained_stay_as_they_were(unbroken: Unbroken, tmp_path):
    state = runs.run(
        unbroken.config,
        tmp_path / "b",
        start_from=unbroken.workdir,
        train__steps=2,
        train__trainable__select="last_layers",
    )
    expected = named_leaves(unbroken.state.ema)
    for name, array in named_leaves(state.params).items():
        same = np.array_equal(np.asarray(array), np.asarray(expected[name]))
        assert same != name.startswith("layers_1/"), name


@pytest.mark.thorough
def test_a_run_that_resumes_does_not_start_again(unbroken: Unbroken, tmp_path):
    options = {"start_from": unbroken.workdir, "optim__schedule__name": "constant"}
    runs.run(unbroken.config, tmp_path / "two", train__steps=2, **options)
    resumed = runs.run(unbroken.config, tmp_path / "two", train__steps=3, **options)
    at_once = runs.run(unbroken.config, tmp_path / "one", train__steps=3, **options)
    assert difference(resumed.params, at_once.params) == 0
    with pytest.raises(UserError, match="belongs to another config: start_from is"):
        runs.run(unbroken.config, tmp_path / "two", **options | {"start_from": ""}, train__steps=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__embed_dim": 32}, "is of another architecture: ema/"),
        ({"data__tokenizer__sentinels": 1}, "it has another tokenizer than data.tokenizer."),
    ],
)
def test_another_model_or_tokenizer_is_refused(unbroken: Unbroken, tmp_path, changes, message: str):
    with pytest.raises(UserError) as caught:
        runs.run(unbroken.config, tmp_path / "b", start_from=unbroken.workdir, **STILL, **changes)
    assert str(caught.value).startswith(f"start_from = '{unbroken.workdir}': ")
    assert message in str(caught.value)


def test_a_folder_without_a_run_is_refused(tiny: pathlib.Path, tmp_path):
    with pytest.raises(UserError, match=r"^start_from = '.*nothing'"):
        runs.run(tiny, tmp_path / "b", start_from=tmp_path / "nothing", **STILL)
    assert not (tmp_path / "nothing").exists()
    # Nothing is left that the corrected command would be refused for.
    assert not (tmp_path / "b" / "config.json").exists()

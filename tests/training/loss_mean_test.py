"""The mean loss of several steps: claims about `training.loss_mean`."""

import dataclasses
import json
import math

import pytest

from research.training.loss_mean import LossMean


def mean_of(*steps: tuple[float, float]) -> LossMean:
    losses = LossMean()
    for loss, weight in steps:
        losses.add(loss, weight)
    return losses


def test_it_is_the_mean_by_weight():
    assert mean_of((2.0, 3.0), (6.0, 1.0)).value() == (2 * 3 + 6 * 1) / 4
    assert mean_of((2.0, 1.0), (6.0, 1.0)).value() == 4.0  # the plain mean of equal weights


def test_no_step_has_no_mean_and_steps_without_a_weight_have_none_to_predict():
    assert math.isnan(mean_of().value())
    assert mean_of((0.0, 0.0)).value() == 0.0
    assert mean_of((0.0, 0.0), (3.0, 2.0)).value() == 3.0


@pytest.mark.parametrize("loss", [0.1, 1e-300, 1 / 3])
def test_it_is_the_same_after_a_checkpoint_in_between(loss):
    kept = json.loads(json.dumps(dataclasses.asdict(mean_of((loss, 0.7), (2.2, 0.1)))))
    resumed = LossMean(**kept)
    resumed.add(3.3, 0.3)
    assert resumed == mean_of((loss, 0.7), (2.2, 0.1), (3.3, 0.3))

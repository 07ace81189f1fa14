"""Learning rates at their knots and by their formulas."""

import math

import numpy as np
import pytest

from research.core.errors import UserError
from research.optim.schedules import ScheduleConfig, build_schedule

PEAK, WARMUP, TOTAL = 0.5, 10, 110


def rates(steps: list[int], total: int = TOTAL, **fields) -> list[float]:
    schedule = build_schedule(ScheduleConfig(**fields), PEAK, total)
    return [float(schedule(step)) for step in steps]


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "inverse_sqrt", "wsd"])
def test_warm_up_rises_in_a_line_to_the_peak(name: str):
    found = rates([0, 1, 5, 10], name=name, warmup_steps=WARMUP, decay_steps=20)
    np.testing.assert_allclose(found, [0.0, 0.05, 0.25, 0.5], rtol=1e-6)


@pytest.mark.parametrize("name", ["constant", "cosine", "linear", "inverse_sqrt", "wsd"])
def test_without_warm_up_the_first_step_has_the_peak(name: str):
    assert rates([0], name=name, decay_steps=20) == [PEAK]


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("constant", lambda step: PEAK),
        (
            "cosine",
            lambda step: PEAK * (0.2 + 0.8 * (1 + math.cos(math.pi * (step - WARMUP) / 100)) / 2),
        ),
        ("linear", lambda step: PEAK * (1 - 0.8 * (step - WARMUP) / 100)),
        ("inverse_sqrt", lambda step: PEAK * math.sqrt(WARMUP / step)),
        ("wsd", lambda step: PEAK * (1 - 0.8 * max(0, step - 90) / 20)),
    ],
)
def test_after_the_warm_up_the_rate_follows_its_formula(name: str, formula):
    steps = [10, 11, 35, 60, 89, 90, 91, 100, 109, 110]
    found = rates(steps, name=name, warmup_steps=WARMUP, decay_steps=20, final_fraction=0.2)
    np.testing.assert_allclose(found, [formula(step) for step in steps], rtol=1e-5)


def test_rate_stays_at_its_end():
    assert rates([110, 111, 500], name="cosine", warmup_steps=WARMUP) == pytest.approx([0.05] * 3)


def test_inverse_square_root_without_warm_up_starts_at_the_peak():
    np.testing.assert_allclose(
        rates([0, 3, 8], name="inverse_sqrt"), [PEAK, PEAK / 2, PEAK / 3], rtol=1e-6
    )


def test_parts_that_fill_the_run_are_accepted():
    found = rates(
        [0, 10, 30], total=30, name="wsd", warmup_steps=10, decay_steps=20, final_fraction=0.0
    )
    assert found == pytest.approx([0.0, PEAK, 0.0])


@pytest.mark.parametrize("name", ["cosine", "wsd"])
def test_parts_longer_than_the_run_are_refused(name: str):
    with pytest.raises(UserError, match=r"warm-up and decay take \d+ steps, but train.steps = 15"):
        rates([0], total=15, name=name, warmup_steps=16, decay_steps=4)
    with pytest.raises(UserError, match=r"warm-up and decay take 16 steps, but train.steps = 15"):
        rates([0], total=15, name="wsd", warmup_steps=12, decay_steps=4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps = -1"),
        ({"decay_steps": -2}, "decay_steps = -2"),
        ({"final_fraction": 1.5}, "final_fraction = 1.5 must lie in"),
        ({"name": "wsd"}, "decay_steps = 0 must be at least 1"),
    ],
)
def test_impossible_shape_is_refused(fields, message: str):
    with pytest.raises(UserError, match=message):
        ScheduleConfig(**fields)

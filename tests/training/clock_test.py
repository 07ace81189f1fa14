"""Time is counted once: claims about `training.clock`."""

import time

import pytest

from research.training.clock import Clock


class Time:
    """A time that passes when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_an_inner_block_pauses_the_outer_one():
    t = Time()
    clock = Clock(t)
    t.now += 1
    with clock.measure("evaluation"):
        t.now += 2
        with clock.measure("compile"):
            t.now += 4
            with clock.measure("evaluation"):
                t.now += 8
        t.now += 16
    with clock.measure("data"):
        t.now += 32
    t.now += 64
    found = clock.seconds()
    assert found == {
        "compute": 0,
        "data": 32,
        "checkpoint": 0,
        "evaluation": 26,
        "compile": 4,
        "other": 65,
    }
    assert sum(found.values()) == t.now - 100
    assert list(found)[-1] == "other"


def test_time_is_counted_while_a_block_is_open_and_not_after_stop():
    t = Time()
    clock = Clock(t)
    with clock.measure("compute"):
        t.now += 3
        assert clock.seconds()["compute"] == 3
        t.now += 4
    clock.stop()
    t.now += 5
    clock.stop()
    with clock.measure("data"):
        t.now += 6
    assert sum(clock.seconds().values()) == clock.seconds()["compute"] == 7


def test_a_block_that_raises_gives_its_time_back():
    t = Time()
    clock = Clock(t)

    def fail() -> None:
        with clock.measure("checkpoint"):
            t.now += 1
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    t.now += 2
    assert (clock.seconds()["checkpoint"], clock.seconds()["other"]) == (1, 2)


def test_real_time_sums_to_wall_time_within_a_percent():
    start = time.perf_counter()
    clock = Clock()
    for _ in range(10):
        with clock.measure("data"):
            time.sleep(0.002)
        with clock.measure("compute"):
            time.sleep(0.01)
    clock.stop()
    wall = time.perf_counter() - start
    seconds = clock.seconds()
    assert sum(seconds.values()) == pytest.approx(wall, rel=0.01)
    assert seconds["compute"] > seconds["data"] > seconds["other"]


def test_the_report_names_every_category():
    t = Time()
    clock = Clock(t)
    assert clock.report().startswith("wall 0.0 s: compute 0.0 %")
    with clock.measure("compute"):
        t.now += 9
    with clock.measure("data"):
        t.now += 0.5
    t.now += 0.5
    assert clock.report() == (
        "wall 10.0 s: compute 90.0 %, data 5.0 %, checkpoint 0.0 %, evaluation 0.0 %, compile 0.0 "
        "%, other 5.0 %"
    )

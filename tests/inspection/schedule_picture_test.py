"""A schedule is drawn with what it costs."""

from research.inspection.schedule_picture import MOST_COLUMNS, schedule_picture
from research.parallel.pipeline_schedule import make_schedule


def test_the_title_says_how_long_devices_wait_and_what_they_keep():
    # (P − 1) / (M + P − 1) = 1 / 4
    assert schedule_picture(make_schedule("1f1b", 2, 3)) == [
        "pipeline: 1f1b, 3 microbatches; devices wait 25.0% of the time, and keep up to 2 inputs",
        "stage 0  F0 F1 ·  F2 B0 ·  B1 B2",
        "stage 1  ·  F0 B0 F1 B1 F2 B2 ·",
    ]
    # The gradient of parameters, of 2, takes the place of a forward pass, of 1: 2 of 42 are waited.
    title, *_ = schedule_picture(make_schedule("zero_bubble", 2, 8))
    assert title.endswith("devices wait 4.8% of the time, and keep up to 4 inputs")


def test_a_long_schedule_is_cut():
    _, *lines = schedule_picture(make_schedule("interleaved", 4, 32, 2))
    assert all(len(line) == MOST_COLUMNS and line.endswith("…") for line in lines)

"""Schedules do everything once and in order, and wait as long as their formulas say."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.parallel.pipeline_schedule import (
    SENDS_BACK,
    Kind,
    PipelineSchedule,
    make_schedule,
    schedule_lines,
)
from research.parallel.pipeline_slots import NO_SLOT, make_tables

SCHEDULES = st.one_of(
    st.tuples(
        st.sampled_from(["gpipe", "1f1b", "zero_bubble"]),
        st.integers(1, 5),
        st.integers(1, 12),
        st.just(1),
    ),
    st.tuples(
        st.sampled_from(["gpipe", "interleaved"]),
        st.sampled_from([1, 2, 4]),
        st.sampled_from([4, 8, 12]),
        st.integers(2, 3),
    ),
)


def all_operations(schedule: PipelineSchedule) -> list[tuple[int, Kind, int, int]]:
    """The tick, the kind, the virtual stage and the microbatch of each operation."""
    found = []
    for tick, row in enumerate(schedule.ticks):
        for device, operation in enumerate(row):
            if operation.kind != Kind.IDLE:
                stage = schedule.virtual_stage(device, operation)
                found.append((tick, operation.kind, stage, operation.microbatch))
    return found


@settings(max_examples=60)
@given(SCHEDULES)
def test_every_operation_is_done_once_and_after_what_it_needs(arguments):
    schedule = make_schedule(*arguments)
    operations = all_operations(schedule)
    ticks = {(kind, stage, micro): tick for tick, kind, stage, micro in operations}
    assert len(ticks) == len(operations)

    kinds = [Kind.FORWARD, Kind.BACKWARD]
    if schedule.name == "zero_bubble":
        kinds = [Kind.FORWARD, Kind.INPUT_GRADIENT, Kind.WEIGHT_GRADIENT]
    wanted = itertools.product(kinds, range(schedule.virtual_stages), range(schedule.microbatches))
    assert set(ticks) == set(wanted)

    for (kind, stage, micro), tick in ticks.items():
        if kind == Kind.FORWARD and stage > 0:
            assert ticks[Kind.FORWARD, stage - 1, micro] < tick
        if kind in SENDS_BACK:
            assert ticks[Kind.FORWARD, stage, micro] < tick
            if stage < schedule.virtual_stages - 1:
                assert ticks[kind, stage + 1, micro] < tick
        if kind == Kind.WEIGHT_GRADIENT:
            assert ticks[Kind.INPUT_GRADIENT, stage, micro] < tick


@settings(max_examples=60)
@given(SCHEDULES)
def test_slots_hold_what_each_operation_reads(arguments):
    schedule = make_schedule(*arguments)
    tables = make_tables(schedule)
    last = schedule.virtual_stages - 1
    inputs = np.full((schedule.devices, tables.input_slots + 1, 2), -1)
    gradients = np.full((schedule.devices, tables.gradient_slots + 1, 2), -1)
    for tick, row in enumerate(schedule.ticks):
        sent = {}
        for device, operation in enumerate(row):
            if operation.kind == Kind.IDLE:
                continue
            stage = schedule.virtual_stage(device, operation)
            name = (stage, operation.microbatch)
            if stage > 0:
                np.testing.assert_array_equal(inputs[device, tables.input_slot[tick, device]], name)
            if operation.kind == Kind.FORWARD:
                sent[device] = (stage + 1, operation.microbatch)
                continue
            slot = tables.gradient_slot[tick, device]
            if stage == last and operation.kind in SENDS_BACK:
                gradients[device, slot] = name
            if stage < last or operation.kind == Kind.WEIGHT_GRADIENT:
                np.testing.assert_array_equal(gradients[device, slot], name)
            if operation.kind in SENDS_BACK:
                sent[device] = (stage - 1, operation.microbatch)
        for device in range(schedule.devices):
            slot = tables.received_input[tick, device]
            before = sent.get((device - 1) % schedule.devices)
            if slot != NO_SLOT:
                inputs[device, slot] = before
            slot = tables.received_gradient[tick, device]
            after = sent.get((device + 1) % schedule.devices)
            if slot != NO_SLOT:
                gradients[device, slot] = after


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 8])
def test_devices_wait_as_long_as_the_formula_says(devices: int):
    f, b, w = 1.0, 1.25, 0.75
    for microbatches in (devices, 2 * devices, 6 * devices):
        work = microbatches * (f + b + w)
        for name in ("gpipe", "1f1b"):
            schedule = make_schedule(name, devices, microbatches)
            assert schedule.seconds(f, b, w) == pytest.approx(work + (devices - 1) * (f + b + w))
        for chunks in (2, 3):
            schedule = make_schedule("interleaved", devices, microbatches, chunks)
            waiting = (devices - 1) * (f + b + w) / chunks
            assert schedule.seconds(f, b, w) == pytest.approx(work + waiting)
            assert schedule.bubble(f, b, w) == pytest.approx(waiting / (work + waiting))
        schedule = make_schedule("zero_bubble", devices, microbatches)
        waiting = (devices - 1) * (f + b - w)
        if microbatches >= 2 * devices - 1:
            assert schedule.seconds(f, b, w) == pytest.approx(work + waiting)
        else:
            assert schedule.seconds(f, b, w) > work + waiting


def test_activations_in_flight_are_bounded_by_the_stages_but_for_gpipe():
    for microbatches in (8, 16, 32):
        assert make_tables(make_schedule("gpipe", 4, microbatches)).input_slots == microbatches
        assert make_tables(make_schedule("1f1b", 4, microbatches)).input_slots == 6
        assert make_tables(make_schedule("interleaved", 4, microbatches, 2)).input_slots == 10


def test_a_schedule_is_drawn_as_a_table():
    assert schedule_lines(make_schedule("1f1b", 2, 3)) == [
        "stage 0  F0 F1 ·  F2 B0 ·  B1 B2",
        "stage 1  ·  F0 B0 F1 B1 F2 B2 ·",
    ]
    assert schedule_lines(make_schedule("interleaved", 2, 2, 2)) == [
        "stage 0  F0a F1a F0b F1b ·   ·   B0b B1b B0a B1a",
        "stage 1  ·   F0a F1a F0b B0b F1b B1b B0a B1a ·",
    ]
    assert schedule_lines(make_schedule("zero_bubble", 2, 3)) == [
        "stage 0  F0 F1 ·  F2 I0 W0 I1 I2 W1 W2",
        "stage 1  ·  F0 I0 F1 I1 F2 I2 W0 W1 W2",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("interleaved", 2, 2, 1), "chunks = 1 must be at least 2"),
        (("1f1b", 2, 3, 2), "chunks = 2 must be 1 with schedule = '1f1b'."),
        (
            ("interleaved", 2, 3, 2),
            "train.accumulation = 3 is not a multiple of mesh.pipeline = 2, as chunks need. Use 4.",
        ),
    ],
)
def test_schedules_that_do_not_fit_are_refused(arguments, message: str):
    with pytest.raises(UserError) as caught:
        make_schedule(*arguments)
    assert str(caught.value).startswith(message)

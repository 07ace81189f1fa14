"""Where the devices of a pipeline keep what arrives until it is used for the last time."""

import dataclasses
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from research.parallel.pipeline_schedule import SENDS_BACK, Kind, PipelineSchedule

# Where a device puts or finds nothing.
NO_SLOT = -1


class _Stay(NamedTuple):
    """How long a device keeps an array.

    Attributes:
      start: the tick in which it arrives, at its end.
      stop: the tick of its last use.
      key: the chunk and the microbatch that it belongs to.
    """

    start: int
    stop: int
    key: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class PipelineTables:
    """A schedule as arrays that a compiled loop reads tick by tick.

    Arrays `[ticks, devices]` have `NO_SLOT` where there is nothing.

    Attributes:
      kind, microbatch, chunk: of each operation.
      input_slot: where the input of the chunk is kept; the first chunk of all makes its own.
      gradient_slot: where the gradient of its output is kept, or is to be kept where the last chunk
          makes its own.
      received_input, received_gradient: where what arrives at the end of the tick is put.
      sends_forward, sends_backward: whether any device sends something in a tick.
      has_first, has_last: whether a device runs the first or the last virtual stage in a tick.
      common_kind: the kind of all devices that are not idle; IDLE where they differ.
      input_slots, gradient_slots: how many a device has.
    """

    kind: Int[np.ndarray, "ticks devices"]
    microbatch: Int[np.ndarray, "ticks devices"]
    chunk: Int[np.ndarray, "ticks devices"]
    input_slot: Int[np.ndarray, "ticks devices"]
    gradient_slot: Int[np.ndarray, "ticks devices"]
    received_input: Int[np.ndarray, "ticks devices"]
    received_gradient: Int[np.ndarray, "ticks devices"]
    sends_forward: Bool[np.ndarray, "ticks"]
    sends_backward: Bool[np.ndarray, "ticks"]
    has_first: Bool[np.ndarray, "ticks"]
    has_last: Bool[np.ndarray, "ticks"]
    common_kind: Int[np.ndarray, "ticks"]
    input_slots: int
    gradient_slots: int


class _Times(NamedTuple):
    """When a device does the operations of one microbatch and one chunk."""

    forward: int
    backward: int
    last: int


def make_tables(schedule: PipelineSchedule) -> PipelineTables:
    """Returns the arrays of a schedule, with as few slots as it allows."""
    times = _operation_times(schedule)
    last_stage = schedule.virtual_stages - 1
    inputs = []
    gradients = []
    for device in range(schedule.devices):
        stays: list[_Stay] = []
        gradient_stays: list[_Stay] = []
        for (stage, microbatch), own in times.items():
            if stage % schedule.devices != device:
                continue
            key = (stage // schedule.devices, microbatch)
            if stage > 0:
                arrival = times[stage - 1, microbatch].forward
                stays.append(_Stay(arrival, own.last, key))
            if stage < last_stage:
                arrival = times[stage + 1, microbatch].backward
                gradient_stays.append(_Stay(arrival, own.last, key))
            elif own.last > own.backward:
                # The last chunk makes it, and needs it again.
                gradient_stays.append(_Stay(own.backward, own.last, key))
        inputs.append(_assign(stays))
        gradients.append(_assign(gradient_stays))
    return _fill(schedule, times, inputs, gradients)


def _operation_times(schedule: PipelineSchedule) -> dict[tuple[int, int], _Times]:
    """Returns the ticks of each virtual stage and microbatch."""
    found: dict[tuple[int, int], dict[str, int]] = {}
    for tick, row in enumerate(schedule.ticks):
        for device, operation in enumerate(row):
            if operation.kind == Kind.IDLE:
                continue
            stage = schedule.virtual_stage(device, operation)
            ticks = found.setdefault((stage, operation.microbatch), {})
            if operation.kind == Kind.FORWARD:
                ticks["forward"] = tick
            if operation.kind in SENDS_BACK:
                ticks["backward"] = tick
            ticks["last"] = tick
    return {key: _Times(**ticks) for key, ticks in found.items()}


def _assign(stays: list[_Stay]) -> dict[tuple[int, int], int]:
    """Returns a slot for each stay; two in one slot do not overlap."""
    slots: dict[tuple[int, int], int] = {}
    # Of each slot, the tick of its last use: it is free from the end of that tick on.
    used_until: list[int] = []
    for stay in sorted(stays):
        free = [slot for slot, until in enumerate(used_until) if until <= stay.start]
        if free:
            slot = free[0]
            used_until[slot] = stay.stop
        else:
            slot = len(used_until)
            used_until.append(stay.stop)
        slots[stay.key] = slot
    return slots


def _fill(
    schedule: PipelineSchedule,
    times: dict[tuple[int, int], _Times],
    inputs: list[dict[tuple[int, int], int]],
    gradients: list[dict[tuple[int, int], int]],
) -> PipelineTables:
    """Returns the arrays, from the slots of each device."""
    shape = (len(schedule.ticks), schedule.devices)
    names = ("kind", "microbatch", "chunk")
    slot_names = ("input_slot", "gradient_slot", "received_input", "received_gradient")
    arrays = {name: np.zeros(shape, np.int32) for name in names}
    arrays |= {name: np.full(shape, NO_SLOT, np.int32) for name in slot_names}
    for tick, row in enumerate(schedule.ticks):
        for device, operation in enumerate(row):
            at = (tick, device)
            key = (operation.chunk, operation.microbatch)
            arrays["kind"][at] = operation.kind
            arrays["microbatch"][at] = operation.microbatch
            arrays["chunk"][at] = operation.chunk
            arrays["input_slot"][at] = inputs[device].get(key, NO_SLOT)
            arrays["gradient_slot"][at] = gradients[device].get(key, NO_SLOT)

    last_stage = schedule.virtual_stages - 1
    for (stage, microbatch), own in times.items():
        if stage < last_stage:
            # Stage 3 of 2 devices is chunk 1 of device 1; the next is chunk 2 of device 0.
            chunk, device = divmod(stage + 1, schedule.devices)
            arrays["received_input"][own.forward, device] = inputs[device][chunk, microbatch]
        if stage > 0:
            chunk, device = divmod(stage - 1, schedule.devices)
            slot = gradients[device][chunk, microbatch]
            arrays["received_gradient"][own.backward, device] = slot
    # Idle devices have chunk 0, which is no stage that they run.
    stage = arrays["chunk"] * schedule.devices + np.arange(schedule.devices)
    runs = arrays["kind"] != Kind.IDLE
    kinds = [set(row) - {Kind.IDLE} for row in arrays["kind"].tolist()]
    return PipelineTables(
        **arrays,
        has_first=(runs & (stage == 0)).any(axis=1),
        has_last=(runs & (stage == last_stage)).any(axis=1),
        common_kind=np.array([min(row) if len(row) == 1 else Kind.IDLE for row in kinds], np.int32),
        sends_forward=(arrays["received_input"] != NO_SLOT).any(axis=1),
        sends_backward=(arrays["received_gradient"] != NO_SLOT).any(axis=1),
        input_slots=max(len(set(slots.values())) for slots in inputs),
        gradient_slots=max(len(set(slots.values())) for slots in gradients),
    )

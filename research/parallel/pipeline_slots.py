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
    devices = range(schedule.devices)
    stays: list[list[_Stay]] = [[] for _ in devices]
    gradient_stays: list[list[_Stay]] = [[] for _ in devices]
    for (stage, microbatch), own in times.items():
        # Stage 5 of 2 devices is chunk 2 of device 1.
        chunk, device = divmod(stage, schedule.devices)
        key = (chunk, microbatch)
        if stage > 0:
            sender = times[stage - 1, microbatch]
            stay = _Stay(sender.forward, own.last, key)
            stays[device].append(stay)
        if stage < last_stage:
            sender = times[stage + 1, microbatch]
            stay = _Stay(sender.backward, own.last, key)
            gradient_stays[device].append(stay)
        elif own.last > own.backward:
            # The last chunk makes it, and needs it again.
            stay = _Stay(own.backward, own.last, key)
            gradient_stays[device].append(stay)

    inputs = [_assign(of_device) for of_device in stays]
    gradients = [_assign(of_device) for of_device in gradient_stays]
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
    kind = np.zeros(shape, np.int32)
    microbatches = np.zeros(shape, np.int32)
    chunks = np.zeros(shape, np.int32)
    input_slot = np.full(shape, NO_SLOT, np.int32)
    gradient_slot = np.full(shape, NO_SLOT, np.int32)
    for tick, row in enumerate(schedule.ticks):
        for device, operation in enumerate(row):
            at = (tick, device)
            kind[at] = operation.kind
            microbatches[at] = operation.microbatch
            chunks[at] = operation.chunk
            key = (operation.chunk, operation.microbatch)
            input_slot[at] = inputs[device].get(key, NO_SLOT)
            gradient_slot[at] = gradients[device].get(key, NO_SLOT)

    last_stage = schedule.virtual_stages - 1
    received_input = np.full(shape, NO_SLOT, np.int32)
    received_gradient = np.full(shape, NO_SLOT, np.int32)
    for (stage, microbatch), own in times.items():
        if stage < last_stage:
            # Stage 3 of 2 devices is chunk 1 of device 1; the next is chunk 2 of device 0.
            chunk, device = divmod(stage + 1, schedule.devices)
            slot = inputs[device][chunk, microbatch]
            received_input[own.forward, device] = slot
        if stage > 0:
            chunk, device = divmod(stage - 1, schedule.devices)
            slot = gradients[device][chunk, microbatch]
            received_gradient[own.backward, device] = slot

    return PipelineTables(
        kind=kind,
        microbatch=microbatches,
        chunk=chunks,
        input_slot=input_slot,
        gradient_slot=gradient_slot,
        received_input=received_input,
        received_gradient=received_gradient,
        sends_forward=_any_slot(received_input),
        sends_backward=_any_slot(received_gradient),
        has_first=_runs_stage(kind, chunks, 0),
        has_last=_runs_stage(kind, chunks, last_stage),
        common_kind=_common_kind(kind),
        input_slots=_most_slots(inputs),
        gradient_slots=_most_slots(gradients),
    )


def _any_slot(slots: Int[np.ndarray, "ticks devices"]) -> Bool[np.ndarray, "ticks"]:
    """Returns whether any device has a slot, by tick."""
    is_slot = slots != NO_SLOT
    return is_slot.any(axis=1)


def _runs_stage(
    kind: Int[np.ndarray, "ticks devices"], chunks: Int[np.ndarray, "ticks devices"], stage: int
) -> Bool[np.ndarray, "ticks"]:
    """Returns whether a device runs a virtual stage, by tick."""
    # Chunk 1 of devices 0 and 1 of 2: stages 2 and 3
    devices = kind.shape[1]
    stages = chunks * devices + np.arange(devices)
    # Idle devices have chunk 0, which is no stage that they run.
    is_run = (stages == stage) & (kind != Kind.IDLE)
    return is_run.any(axis=1)


def _common_kind(kind: Int[np.ndarray, "ticks devices"]) -> Int[np.ndarray, "ticks"]:
    """Returns the kind of all devices that are not idle; IDLE where they differ."""
    common = []
    for row in kind.tolist():
        kinds = set(row) - {Kind.IDLE}
        if len(kinds) == 1:
            common += kinds
        else:
            common.append(Kind.IDLE)
    return np.array(common, np.int32)


def _most_slots(slots: list[dict[tuple[int, int], int]]) -> int:
    """Returns how many slots the device with the most of them has."""
    counts = []
    for of_device in slots:
        distinct = set(of_device.values())
        counts.append(len(distinct))
    return max(counts)

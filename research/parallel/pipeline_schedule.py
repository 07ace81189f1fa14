"""Pipeline schedules as data: which stage does what in which tick.

A pipeline has P devices. Each has V chunks of consecutive layers: chunk v of device d is virtual
stage q = v P + d of P V. Every one of M microbatches passes all virtual stages forward, and then
backward.

All devices run one program, tick by tick: what a device sends in a tick arrives before the next
one. A tick takes as long as its longest operation, so ticks are made of one kind of operation
wherever that is possible: forward ticks and backward ticks.
"""

import dataclasses
import enum
from typing import Literal

from research.core.errors import UserError

Name = Literal["gpipe", "1f1b", "interleaved", "zero_bubble"]


class Kind(enum.IntEnum):
    """What a device does in a tick.

    A backward pass is whole, or in two parts: the gradient of the stage's input, which the device
    before it waits for, and that of its parameters, which nobody waits for.
    """

    IDLE = 0
    FORWARD = 1
    BACKWARD = 2
    INPUT_GRADIENT = 3
    WEIGHT_GRADIENT = 4


# What a device must have done with a microbatch before the device before it can go on.
SENDS_BACK = (Kind.BACKWARD, Kind.INPUT_GRADIENT)


@dataclasses.dataclass(frozen=True)
class Operation:
    """What one device does in one tick.

    Attributes:
      kind: of the operation.
      microbatch: from 0.
      chunk: of the device, from 0.
    """

    kind: Kind = Kind.IDLE
    microbatch: int = 0
    chunk: int = 0


@dataclasses.dataclass(frozen=True)
class PipelineSchedule:
    """A table of operations.

    Attributes:
      name: of the schedule.
      devices: P.
      microbatches: M.
      chunks: of a device, V.
      ticks: the operation of each device, tick by tick.
    """

    name: Name
    devices: int
    microbatches: int
    chunks: int
    ticks: tuple[tuple[Operation, ...], ...]

    @property
    def virtual_stages(self) -> int:
        """The number of chunks of all devices."""
        return self.devices * self.chunks

    @property
    def kinds(self) -> list[Kind]:
        """The kinds of operations that it has, IDLE first."""
        found = {Kind.IDLE}
        for tick in self.ticks:
            for operation in tick:
                found.add(operation.kind)
        return sorted(found)

    @property
    def has_mixed_ticks(self) -> bool:
        """Whether there are ticks in which devices do operations of different kinds."""
        for tick in self.ticks:
            kinds = {operation.kind for operation in tick}
            if len(kinds - {Kind.IDLE}) > 1:
                return True
        return False

    def virtual_stage(self, device: int, operation: Operation) -> int:
        """Returns the index of a chunk among those of all devices, in the order of the layers."""
        return operation.chunk * self.devices + device

    def seconds(self, forward: float, input_gradient: float, weight_gradient: float) -> float:
        """Returns how long all ticks take.

        Args:
          forward, input_gradient, weight_gradient: of one microbatch through all chunks of one
              device, in seconds.
        """
        cost = {
            Kind.IDLE: 0.0,
            Kind.FORWARD: forward,
            Kind.BACKWARD: input_gradient + weight_gradient,
            Kind.INPUT_GRADIENT: input_gradient,
            Kind.WEIGHT_GRADIENT: weight_gradient,
        }
        longest = [max(cost[operation.kind] for operation in tick) for tick in self.ticks]
        return sum(longest) / self.chunks

    def bubble(self, forward: float, input_gradient: float, weight_gradient: float) -> float:
        """Returns the share of the time in which a device waits for others; as of `seconds`."""
        work = self.microbatches * (forward + input_gradient + weight_gradient)
        return 1 - work / self.seconds(forward, input_gradient, weight_gradient)


def make_schedule(name: Name, devices: int, microbatches: int, chunks: int = 1) -> PipelineSchedule:
    """Returns the table of a schedule.

    - `gpipe`: all forward passes, then all backward passes.
    - `1f1b`: a microbatch goes back as soon as it has passed the last stage.
    - `interleaved`: the same with several chunks on each device, which cut the bubble by as much.
    - `zero_bubble`: `1f1b` with the backward pass in two parts; gradients of parameters fill ticks
      in which a device would wait.

    With f, b and w the times of a forward pass, of the gradient of an input and of that of the
    parameters, devices wait in all (P − 1)(f + b + w) / V. With `zero_bubble` it is
    (P − 1)(f + b − w) where w is at most f and b, and M is at least 2P − 1.

    Raises:
      UserError: there are too few microbatches, or chunks that the schedule does not have.

    Source: Huang et al. 2019 (GPipe), arXiv:1811.06965; Narayanan et al. 2021, arXiv:2104.04473,
        sections 2.2.1 and 2.2.2; Qi et al. 2023 (Zero Bubble), arXiv:2401.10241, section 2.3,
        ZB-H1. Here a microbatch starts in the tick after the one before it, so a device holds up to
        2P − 1 of them instead of P.
    """
    if name == "interleaved" and chunks < 2:
        raise UserError("chunks", chunks, "must be at least 2 with schedule = 'interleaved'.")
    if name in ("1f1b", "zero_bubble") and chunks > 1:
        raise UserError("chunks", chunks, f"must be 1 with schedule = {name!r}.")
    if chunks > 1 and microbatches % devices:
        raise UserError(
            "train.accumulation",
            microbatches,
            f"is not a multiple of mesh.pipeline = {devices}, as chunks need. Use "
            f"{-(-microbatches // devices) * devices}.",
        )

    # GPipe goes back when the last forward pass is done; the others as soon as they can.
    total = microbatches * chunks
    delay = total + devices - 1 if name == "gpipe" else devices * chunks - 1
    ticks = _forward_and_backward(devices, microbatches, chunks, delay)
    if name == "zero_bubble":
        ticks = _split_backward(ticks, devices, microbatches)
    return PipelineSchedule(name, devices, microbatches, chunks, tuple(map(tuple, ticks)))


def _forward_and_backward(
    devices: int, microbatches: int, chunks: int, delay: int
) -> list[list[Operation]]:
    """Returns pairs of a forward and a backward tick, without those in which no device does
    anything.

    Args:
      devices, microbatches, chunks: P, M and V.
      delay: of the backward tick in which the last stage has its first microbatch.
    """
    total = microbatches * chunks
    ticks = []
    for pair in range(delay + total + devices - 1):
        forward = []
        backward = []
        for device in range(devices):
            # Each device begins one pair after the device before it; backward it is the reverse.
            step = pair - device
            forward.append(_operation(Kind.FORWARD, step, devices, total, chunks))
            step = pair - delay - (devices - 1 - device)
            backward.append(_operation(Kind.BACKWARD, step, devices, total, chunks))
        for tick in (forward, backward):
            if any(operation.kind != Kind.IDLE for operation in tick):
                ticks.append(tick)
    return ticks


def _operation(kind: Kind, step: int, devices: int, total: int, chunks: int) -> Operation:
    """Returns what a device does in its own n-th step of a kind, from 0.

    Groups of P microbatches pass one chunk after the other; backward, the last chunk is first.
    """
    if not 0 <= step < total:
        return Operation()
    # 2 devices with 2 chunks: microbatches 0 1 0 1 2 3 2 3 in chunks 0 0 1 1 0 0 1 1
    group, within = divmod(step, devices * chunks)
    if chunks == 1:
        return Operation(kind, step, 0)
    chunk, member = divmod(within, devices)
    if kind == Kind.BACKWARD:
        chunk = chunks - 1 - chunk
    return Operation(kind, group * devices + member, chunk)


def _split_backward(
    ticks: list[list[Operation]], devices: int, microbatches: int
) -> list[list[Operation]]:
    """Returns the ticks with gradients of inputs instead of backward passes, and gradients of
    parameters in free places, and in ticks of their own where there are none.
    """
    split = []
    pending: list[list[Operation]] = [[] for _ in range(devices)]
    # Every device has P − 1 free places, in forward ticks after its own and in backward ticks after
    # its own; the last devices have theirs at the end, and keep as many gradients for them.
    own_ticks = max(microbatches - (devices - 1), 0)
    for tick in ticks:
        row = []
        for device, operation in enumerate(tick):
            if operation.kind == Kind.BACKWARD:
                operation = dataclasses.replace(operation, kind=Kind.INPUT_GRADIENT)
            elif operation.kind == Kind.IDLE and pending[device]:
                operation = pending[device].pop(0)
            row.append(operation)
        split.append(row)

        for device, operation in enumerate(row):
            if operation.kind == Kind.INPUT_GRADIENT:
                weight = dataclasses.replace(operation, kind=Kind.WEIGHT_GRADIENT)
                pending[device].append(weight)
        spare = [len(operations) - 1 - device for device, operations in enumerate(pending)]
        if own_ticks and min(spare) > 0:
            split.append([operations.pop(0) for operations in pending])
            own_ticks -= 1

    while any(pending):
        split.append([operations.pop(0) if operations else Operation() for operations in pending])
    return split


def schedule_lines(schedule: PipelineSchedule) -> list[str]:
    """Returns the table as text: a line for each device, a column for each tick.

    `F` is a forward pass, `B` a backward pass, `I` the gradient of an input and `W` that of the
    parameters, with the number of the microbatch, and a letter for the chunk where there are
    several.
    """
    letters = {
        Kind.FORWARD: "F",
        Kind.BACKWARD: "B",
        Kind.INPUT_GRADIENT: "I",
        Kind.WEIGHT_GRADIENT: "W",
    }
    width = len(str(schedule.microbatches - 1)) + 1 + (schedule.chunks > 1)
    lines = []
    for device in range(schedule.devices):
        cells = []
        for tick in schedule.ticks:
            operation = tick[device]
            if operation.kind == Kind.IDLE:
                cells.append("·".ljust(width))
                continue
            text = f"{letters[operation.kind]}{operation.microbatch}"
            if schedule.chunks > 1:
                text += chr(ord("a") + operation.chunk)
            cells.append(text.ljust(width))
        lines.append(f"stage {device}  " + " ".join(cells).rstrip())
    return lines

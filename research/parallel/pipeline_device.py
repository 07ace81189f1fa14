"""One device of a pipeline: it goes through the ticks of a schedule, and does its part of each.

A backward pass computes its stage's forward pass again from the stage's input, which is all that is
kept of it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.parallel.mesh_axes import PIPELINE_AXIS
from research.parallel.pipeline_schedule import Kind, PipelineSchedule
from research.parallel.pipeline_slots import PipelineTables, make_tables
from research.parallel.rules import constrain

Hidden = Float[Array, "B T D"]
# The logical axes of hidden states, and of buffers of them.
_HIDDEN_AXES = ("batch", "length", "embed")
_BUFFER_AXES = (None, *_HIDDEN_AXES)


@dataclasses.dataclass(frozen=True)
class StagedModel:
    """A model as parts, which are functions of parameters and a microbatch.

    Attributes:
      microbatch: (inputs of a batch, index) -> those of a microbatch.
      enter: (outer, microbatch) -> the hidden states before the first stage.
      run_stage: (outer, layers of a stage, index of the first of them, hidden states, microbatch)
          -> (hidden states, report). A report is a tree of arrays [layers of the stage, …].
      leave: (outer, hidden states, microbatch) -> (what is minimized, a tree of sums).
    """

    microbatch: Callable[[Any, Int[Array, ""]], Any]
    enter: Callable[[Any, Any], Hidden]
    run_stage: Callable[[Any, Any, Int[Array, ""], Hidden, Any], tuple[Hidden, Any]]
    leave: Callable[[Any, Hidden, Any], tuple[Float[Array, ""], Any]]


class PipelineResult(NamedTuple):
    """Sums over all microbatches.

    Attributes:
      value: of what is minimized by `leave`.
      sums: what `leave` gives beside it.
      report: of all layers, in their order, `[L, …]`.
      outer, layers: gradients.
    """

    value: Float[Array, ""]
    sums: Any
    report: Any
    outer: Any
    layers: Any


class _Tick(NamedTuple):
    """What the tables say of this device in a tick, and of all devices; see `PipelineTables`."""

    kind: Int[Array, ""]
    microbatch: Int[Array, ""]
    chunk: Int[Array, ""]
    input_slot: Int[Array, ""]
    gradient_slot: Int[Array, ""]
    received_input: Int[Array, ""]
    received_gradient: Int[Array, ""]
    sends_forward: Bool[Array, ""]
    sends_backward: Bool[Array, ""]
    has_first: Bool[Array, ""]
    has_last: Bool[Array, ""]
    common_kind: Int[Array, ""]


class _Carry(NamedTuple):
    """What a device keeps from tick to tick.

    Attributes:
      inputs, gradients: of hidden states, by slot; the last slot is for what is not kept.
      value, sums, report, outer, layers: the results so far; a report and gradients of layers by
          chunk.
    """

    inputs: Float[Array, "slots B T D"]
    gradients: Float[Array, "slots B T D"]
    value: Float[Array, ""]
    sums: Any
    report: Any
    outer: Any
    layers: Any


@dataclasses.dataclass(frozen=True)
class PipelineDevice:
    """One device's part of a pipeline.

    Attributes:
      schedule, model, outer, inputs, report_gradient: as of `run_pipeline`.
      layers: of this device, `[chunks, layers of a chunk, …]`.
    """

    schedule: PipelineSchedule
    model: StagedModel
    outer: Any
    layers: Any
    inputs: Any
    report_gradient: Any

    def run(self) -> PipelineResult:
        """Goes through the ticks; gradients of what is no stage are summed over the devices."""
        tables = make_tables(self.schedule)
        place = jax.lax.axis_index(PIPELINE_AXIS)
        rows = []
        for name in _Tick._fields:
            table = jnp.asarray(getattr(tables, name))
            if table.ndim == 2:
                # [ticks, devices] -> [ticks]
                table = table[:, place]
            rows.append(table)
        carry, _ = jax.lax.scan(self._tick, self._empty(tables), _Tick(*rows))
        value, sums, outer = jax.lax.psum((carry.value, carry.sums, carry.outer), PIPELINE_AXIS)
        return PipelineResult(value, sums, carry.report, outer, carry.layers)

    def _empty(self, tables: PipelineTables) -> _Carry:
        """Returns zeros."""
        index = jnp.zeros((), jnp.int32)
        first = self.model.microbatch(self.inputs, index)
        chunk = jax.tree.map(lambda x: x[0], self.layers)
        hidden = jax.eval_shape(self.model.enter, self.outer, first)
        _, report = jax.eval_shape(self.model.run_stage, self.outer, chunk, index, hidden, first)
        value, sums = jax.eval_shape(self.model.leave, self.outer, hidden, first)

        def zeros(tree: Any, *leading: int) -> Any:
            return jax.tree.map(lambda x: jnp.zeros((*leading, *x.shape), x.dtype), tree)

        inputs = zeros(hidden, tables.input_slots + 1)
        gradients = zeros(hidden, tables.gradient_slots + 1)
        return _Carry(
            inputs=constrain(inputs, _BUFFER_AXES),
            gradients=constrain(gradients, _BUFFER_AXES),
            value=zeros(value),
            sums=zeros(sums),
            report=zeros(report, self.schedule.chunks),
            outer=zeros(self.outer),
            layers=zeros(self.layers),
        )

    def _tick(self, carry: _Carry, tick: _Tick) -> tuple[_Carry, None]:
        """Does what this device has to do, and exchanges results with its neighbours.

        Where all devices that do something do the same, the others do it too, on what they have,
        and keep nothing of it: collectives inside operations are then called by all devices.
        """
        used = sorted({operation.kind for row in self.schedule.ticks for operation in row})
        # Kinds that the schedule has, such as 0, 3 and 4: their places among the branches.
        places = jnp.array([used.index(kind) if kind in used else 0 for kind in Kind])
        branches = [self._branch(kind, tick) for kind in used]

        # Of different kinds, each device does its own.
        def each_its_own(carry: _Carry) -> tuple[_Carry, Hidden]:
            return jax.lax.switch(places[tick.kind], branches, carry)

        together = [each_its_own, *branches[1:]]
        if all(len({op.kind for op in row} - {Kind.IDLE}) == 1 for row in self.schedule.ticks):
            together = branches
        carry, sent = jax.lax.switch(places[tick.common_kind], together, carry)

        # A device that has nothing for a neighbour sends it something that it puts aside.
        after = self._rotated(sent, 1, tick.sends_forward)
        before = self._rotated(sent, -1, tick.sends_backward)
        carry = carry._replace(
            inputs=carry.inputs.at[tick.received_input].set(after),
            gradients=carry.gradients.at[tick.received_gradient].set(before),
        )
        return carry, None

    def _branch(self, kind: Kind, tick: _Tick) -> Callable[[_Carry], tuple[_Carry, Hidden]]:
        """Returns an operation as a function of what a device keeps."""

        def operate(carry: _Carry) -> tuple[_Carry, Hidden]:
            after, sent = _OPERATIONS[kind](self, carry, tick)
            return self._kept(after), _laid_out(sent)

        return operate

    def _kept(self, carry: _Carry) -> _Carry:
        """Returns what a device keeps, laid out as it always is."""
        return carry._replace(
            inputs=constrain(carry.inputs, _BUFFER_AXES),
            gradients=constrain(carry.gradients, _BUFFER_AXES),
        )

    def _rotated(self, sent: Hidden, step: int, is_needed: Array) -> Hidden:
        """Returns what the device `step` places before this one sends, if any device needs it."""
        devices = self.schedule.devices
        pairs = [(place, (place + step) % devices) for place in range(devices)]
        # All devices agree on it.
        return jax.lax.cond(
            is_needed,
            lambda x: _laid_out(jax.lax.ppermute(x, PIPELINE_AXIS, pairs)),
            lambda x: _laid_out(jnp.zeros_like(x)),
            sent,
        )

    def _stage(self, tick: _Tick) -> Int[Array, ""]:
        """Returns the virtual stage of an operation."""
        return tick.chunk * self.schedule.devices + jax.lax.axis_index(PIPELINE_AXIS)

    def _micro(self, tick: _Tick) -> Any:
        return self.model.microbatch(self.inputs, tick.microbatch)

    def _chunk(self, tick: _Tick) -> Any:
        """Returns the parameters of an operation's layers."""
        return jax.tree.map(lambda x: x[tick.chunk], self.layers)

    def _active(self, tick: _Tick) -> Bool[Array, ""]:
        return tick.kind != Kind.IDLE

    def _is_first(self, tick: _Tick) -> Bool[Array, ""]:
        return self._active(tick) & (self._stage(tick) == 0)

    def _is_last(self, tick: _Tick) -> Bool[Array, ""]:
        return self._active(tick) & (self._stage(tick) == self.schedule.virtual_stages - 1)

    def _input(self, carry: _Carry, tick: _Tick) -> Hidden:
        """Returns the hidden states before an operation's layers."""
        kept = _laid_out(carry.inputs[tick.input_slot])

        def entered(kept: Hidden) -> Hidden:
            x = _laid_out(self.model.enter(self.outer, self._micro(tick)))
            return _laid_out(jnp.where(self._is_first(tick), x, kept))

        return jax.lax.cond(tick.has_first, entered, lambda kept: kept, kept)

    def _forward(self, tick: _Tick, outer: Any, chunk: Any, x: Hidden) -> tuple[Hidden, Any]:
        """Runs an operation's layers."""
        layers_of_chunk = len(jax.tree.leaves(self.layers)[0][0])
        first_layer = self._stage(tick) * layers_of_chunk
        return self.model.run_stage(outer, chunk, first_layer, x, self._micro(tick))

    def _leave(self, carry: _Carry, tick: _Tick, y: Hidden) -> tuple[_Carry, Hidden]:
        """Returns the gradient of an operation's output; behind the last layers it is made here."""
        is_last = self._is_last(tick)

        def from_loss(carry: _Carry) -> tuple[_Carry, Hidden]:
            def minimized(outer: Any, y: Hidden) -> tuple[Array, Any]:
                return self.model.leave(outer, y, self._micro(tick))

            # Other devices take the gradient of 0, at 0.
            own = jnp.where(is_last, y, 0)
            value, vjp, sums = jax.vjp(minimized, self.outer, own, has_aux=True)
            d_outer, dy = vjp(is_last.astype(value.dtype))
            dy = jnp.where(is_last, dy, carry.gradients[tick.gradient_slot])
            value, sums = _where(is_last, (value, sums))
            carry = carry._replace(
                value=carry.value + value,
                sums=_added(carry.sums, sums),
                outer=_added(carry.outer, d_outer),
                gradients=carry.gradients.at[tick.gradient_slot].set(dy),
            )
            return self._kept(carry), _laid_out(dy)

        def from_next_stage(carry: _Carry) -> tuple[_Carry, Hidden]:
            return self._kept(carry), _laid_out(carry.gradients[tick.gradient_slot])

        return jax.lax.cond(tick.has_last, from_loss, from_next_stage, carry)

    def _enter_gradient(self, carry: _Carry, tick: _Tick, dx: Hidden) -> _Carry:
        """Adds the gradients of what comes before the first layers."""

        def add(carry: _Carry) -> _Carry:
            _, vjp = jax.vjp(lambda outer: self.model.enter(outer, self._micro(tick)), self.outer)
            (d_outer,) = vjp(jnp.where(self._is_first(tick), dx, 0))
            return self._kept(carry._replace(outer=_added(carry.outer, d_outer)))

        return jax.lax.cond(tick.has_first, add, self._kept, carry)

    def _add_layers(self, carry: _Carry, tick: _Tick, d_outer: Any, d_chunk: Any) -> _Carry:
        """Adds the gradients of an operation's layers, and of what else they read."""
        d_outer, d_chunk = _where(self._active(tick), (d_outer, d_chunk))
        layers = jax.tree.map(lambda x, d: x.at[tick.chunk].add(d), carry.layers, d_chunk)
        return carry._replace(outer=_added(carry.outer, d_outer), layers=layers)


def _where(condition: Bool[Array, ""], tree: Any) -> Any:
    """Returns a tree, or zeros."""
    return jax.tree.map(lambda x: jnp.where(condition, x, jnp.zeros_like(x)), tree)


def _laid_out(x: Hidden) -> Hidden:
    """Returns hidden states as all branches have them: a branch may not shard them otherwise."""
    return constrain(x, _HIDDEN_AXES)


def _added(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


# An operation of a device -> what it keeps, and what it sends.
Operate = Callable[..., tuple[_Carry, Hidden]]


def _idle(device: PipelineDevice, carry: _Carry, tick: _Tick) -> tuple[_Carry, Hidden]:
    return carry, jnp.zeros_like(carry.inputs[0])


def _run_forward(device: PipelineDevice, carry: _Carry, tick: _Tick) -> tuple[_Carry, Hidden]:
    x = device._input(carry, tick)
    y, report = device._forward(tick, device.outer, device._chunk(tick), x)
    report = _where(device._active(tick), report)
    reports = jax.tree.map(lambda total, new: total.at[tick.chunk].add(new), carry.report, report)
    return carry._replace(report=reports), y


def _run_backward(device: PipelineDevice, carry: _Carry, tick: _Tick) -> tuple[_Carry, Hidden]:
    x = device._input(carry, tick)
    forward = functools.partial(device._forward, tick)
    (y, _), vjp = jax.vjp(forward, device.outer, device._chunk(tick), x)
    carry, dy = device._leave(carry, tick, y)
    d_outer, d_chunk, dx = vjp((dy, device.report_gradient))
    carry = device._add_layers(carry, tick, d_outer, d_chunk)
    return device._enter_gradient(carry, tick, dx), dx


def _run_input_gradient(
    device: PipelineDevice, carry: _Carry, tick: _Tick
) -> tuple[_Carry, Hidden]:
    x = device._input(carry, tick)
    forward = functools.partial(device._forward, tick, device.outer, device._chunk(tick))
    (y, _), vjp = jax.vjp(forward, x)
    carry, dy = device._leave(carry, tick, y)
    (dx,) = vjp((dy, device.report_gradient))
    return device._enter_gradient(carry, tick, dx), dx


def _run_weight_gradient(
    device: PipelineDevice, carry: _Carry, tick: _Tick
) -> tuple[_Carry, Hidden]:
    x = device._input(carry, tick)

    def forward(outer: Any, chunk: Any) -> tuple[Hidden, Any]:
        return device._forward(tick, outer, chunk, x)

    _, vjp = jax.vjp(forward, device.outer, device._chunk(tick))
    d_outer, d_chunk = vjp((carry.gradients[tick.gradient_slot], device.report_gradient))
    carry = device._add_layers(carry, tick, d_outer, d_chunk)
    return carry, jnp.zeros_like(x)


_OPERATIONS: dict[Kind, Operate] = {
    Kind.IDLE: _idle,
    Kind.FORWARD: _run_forward,
    Kind.BACKWARD: _run_backward,
    Kind.INPUT_GRADIENT: _run_input_gradient,
    Kind.WEIGHT_GRADIENT: _run_weight_gradient,
}

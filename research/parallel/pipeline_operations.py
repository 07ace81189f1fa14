"""What a device of a pipeline does in a tick: a forward pass of some of its layers, or gradients.

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
from research.parallel.rules import constrain
from research.parallel.stages import LayerRange, StageSplit

Hidden = Float[Array, "B T D"]


@dataclasses.dataclass(frozen=True)
class StagedModel:
    """A model as parts, which are functions of parameters and a microbatch.

    Attributes:
      microbatch: (inputs of a batch, index) -> those of a microbatch.
      enter: (outer, microbatch) -> the hidden states before the first stage.
      run_stage: (outer, layers of a stage, which they are, hidden states, microbatch) -> (hidden
          states, report). A report is a tree of arrays [places of the stage, …], with zeros where
          there is no layer.
      leave: (outer, hidden states, microbatch) -> (what is minimized, a tree of sums).
      hidden_axes: the logical axes of hidden states.
    """

    microbatch: Callable[[Any, Int[Array, ""]], Any]
    enter: Callable[[Any, Any], Hidden]
    run_stage: Callable[[Any, Any, LayerRange, Hidden, Any], tuple[Hidden, Any]]
    leave: Callable[[Any, Hidden, Any], tuple[Float[Array, ""], Any]]
    hidden_axes: tuple[str, ...] = ("batch", "length", "embed")


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


class Tick(NamedTuple):
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


class Carry(NamedTuple):
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
class StageOperations:
    """The operations of one stage.

    Attributes:
      schedule, model, split, outer, inputs, report_gradient: as of `pipeline.run_pipeline`.
      layers: of this device, `[chunks, places of a chunk, …]`.
    """

    schedule: PipelineSchedule
    model: StagedModel
    split: StageSplit
    outer: Any
    layers: Any
    inputs: Any
    report_gradient: Any

    def operation(self, kind: Kind, tick: Tick) -> Callable[[Carry], tuple[Carry, Hidden]]:
        """Returns an operation: from what a device keeps to that, and what it sends."""

        def operate(carry: Carry) -> tuple[Carry, Hidden]:
            after, sent = _OPERATIONS[kind](self, carry, tick)
            return self.laid_out_carry(after), self.laid_out(sent)

        return operate

    def laid_out(self, x: Hidden) -> Hidden:
        """Returns hidden states as all branches have them; none may shard them otherwise."""
        return constrain(x, self.model.hidden_axes)

    def laid_out_carry(self, carry: Carry) -> Carry:
        """Returns what a device keeps, with its buffers as all branches have them."""
        axes = (None, *self.model.hidden_axes)
        inputs = constrain(carry.inputs, axes)
        gradients = constrain(carry.gradients, axes)
        return carry._replace(inputs=inputs, gradients=gradients)

    def _stage(self, tick: Tick) -> Int[Array, ""]:
        """Returns the virtual stage of an operation."""
        device = jax.lax.axis_index(PIPELINE_AXIS)
        return tick.chunk * self.schedule.devices + device

    def _micro(self, tick: Tick) -> Any:
        return self.model.microbatch(self.inputs, tick.microbatch)

    def _chunk(self, tick: Tick) -> Any:
        """Returns the parameters of an operation's layers."""
        return jax.tree.map(lambda x: x[tick.chunk], self.layers)

    def _active(self, tick: Tick) -> Bool[Array, ""]:
        return tick.kind != Kind.IDLE

    def _is_first(self, tick: Tick) -> Bool[Array, ""]:
        at_first = self._stage(tick) == 0
        return self._active(tick) & at_first

    def _is_last(self, tick: Tick) -> Bool[Array, ""]:
        last = self.schedule.virtual_stages - 1
        at_last = self._stage(tick) == last
        return self._active(tick) & at_last

    def _input(self, carry: Carry, tick: Tick) -> Hidden:
        """Returns the hidden states before an operation's layers."""
        kept = carry.inputs[tick.input_slot]
        kept = self.laid_out(kept)

        def entered(kept: Hidden) -> Hidden:
            micro = self._micro(tick)
            x = self.laid_out(self.model.enter(self.outer, micro))
            is_first = self._is_first(tick)
            x = jnp.where(is_first, x, kept)
            return self.laid_out(x)

        # Made where some device runs the first layers, and kept from the device before elsewhere.
        return jax.lax.cond(tick.has_first, entered, lambda kept: kept, kept)

    def _forward(self, tick: Tick, outer: Any, chunk: Any, x: Hidden) -> tuple[Hidden, Any]:
        """Runs an operation's layers."""
        stage = self._stage(tick)
        own = self.split.layers_of(stage)
        micro = self._micro(tick)
        return self.model.run_stage(outer, chunk, own, x, micro)

    def _leave(self, carry: Carry, tick: Tick, y: Hidden) -> tuple[Carry, Hidden]:
        """Returns the gradient of an operation's output; behind the last layers it is made here."""
        is_last = self._is_last(tick)

        def from_loss(carry: Carry) -> tuple[Carry, Hidden]:
            micro = self._micro(tick)

            def minimized(outer: Any, y: Hidden) -> tuple[Array, Any]:
                return self.model.leave(outer, y, micro)

            # Other devices take the gradient of 0, at 0.
            own = jnp.where(is_last, y, 0)
            value, vjp, sums = jax.vjp(minimized, self.outer, own, has_aux=True)
            cotangent = is_last.astype(value.dtype)
            d_outer, dy = vjp(cotangent)
            # 0 times a derivative at 0 is no number where that is infinite.
            value, sums, d_outer = _where(is_last, (value, sums, d_outer))

            # Kept, for the gradients of the parameters may be taken later.
            arrived = carry.gradients[tick.gradient_slot]
            dy = jnp.where(is_last, dy, arrived)
            gradients = carry.gradients.at[tick.gradient_slot].set(dy)
            carry = carry._replace(
                value=carry.value + value,
                sums=_added(carry.sums, sums),
                outer=_added(carry.outer, d_outer),
                gradients=gradients,
            )
            return self.laid_out_carry(carry), self.laid_out(dy)

        def from_next_stage(carry: Carry) -> tuple[Carry, Hidden]:
            arrived = carry.gradients[tick.gradient_slot]
            return self.laid_out_carry(carry), self.laid_out(arrived)

        return jax.lax.cond(tick.has_last, from_loss, from_next_stage, carry)

    def _enter_gradient(self, carry: Carry, tick: Tick, dx: Hidden) -> Carry:
        """Adds the gradients of what comes before the first layers."""

        def add(carry: Carry) -> Carry:
            micro = self._micro(tick)

            def enter(outer: Any) -> Hidden:
                return self.model.enter(outer, micro)

            _, vjp = jax.vjp(enter, self.outer)
            is_first = self._is_first(tick)
            own = jnp.where(is_first, dx, 0)
            (d_outer,) = vjp(own)
            outer = _added(carry.outer, d_outer)
            return self.laid_out_carry(carry._replace(outer=outer))

        return jax.lax.cond(tick.has_first, add, self.laid_out_carry, carry)

    def _add_layers(self, carry: Carry, tick: Tick, d_outer: Any, d_chunk: Any) -> Carry:
        """Adds the gradients of an operation's layers, and of what else they read."""
        active = self._active(tick)
        d_outer, d_chunk = _where(active, (d_outer, d_chunk))
        outer = _added(carry.outer, d_outer)
        layers = _added_to_chunk(carry.layers, d_chunk, tick)
        return carry._replace(outer=outer, layers=layers)


def _added_to_chunk(total: Any, part: Any, tick: Tick) -> Any:
    """Returns sums by chunk with those of an operation's chunk added."""

    def add(total: Array, part: Array) -> Array:
        return total.at[tick.chunk].add(part)

    return jax.tree.map(add, total, part)


def _where(condition: Bool[Array, ""], tree: Any) -> Any:
    """Returns a tree, or zeros."""

    def choose(x: Array) -> Array:
        zeros = jnp.zeros_like(x)
        return jnp.where(condition, x, zeros)

    return jax.tree.map(choose, tree)


def _added(a: Any, b: Any) -> Any:
    return jax.tree.map(jnp.add, a, b)


# An operation of a device -> what it keeps, and what it sends.
Operate = Callable[..., tuple[Carry, Hidden]]


def _idle(stage: StageOperations, carry: Carry, tick: Tick) -> tuple[Carry, Hidden]:
    return carry, jnp.zeros_like(carry.inputs[0])


def _run_forward(stage: StageOperations, carry: Carry, tick: Tick) -> tuple[Carry, Hidden]:
    x = stage._input(carry, tick)
    chunk = stage._chunk(tick)
    y, report = stage._forward(tick, stage.outer, chunk, x)

    active = stage._active(tick)
    report = _where(active, report)
    reports = _added_to_chunk(carry.report, report, tick)
    return carry._replace(report=reports), y


def _run_backward(stage: StageOperations, carry: Carry, tick: Tick) -> tuple[Carry, Hidden]:
    x = stage._input(carry, tick)
    chunk = stage._chunk(tick)
    forward = functools.partial(stage._forward, tick)
    (y, _), vjp = jax.vjp(forward, stage.outer, chunk, x)

    carry, dy = stage._leave(carry, tick, y)
    cotangent = (dy, stage.report_gradient)
    d_outer, d_chunk, dx = vjp(cotangent)
    carry = stage._add_layers(carry, tick, d_outer, d_chunk)
    carry = stage._enter_gradient(carry, tick, dx)
    return carry, dx


def _run_input_gradient(stage: StageOperations, carry: Carry, tick: Tick) -> tuple[Carry, Hidden]:
    x = stage._input(carry, tick)
    chunk = stage._chunk(tick)
    forward = functools.partial(stage._forward, tick, stage.outer, chunk)
    (y, _), vjp = jax.vjp(forward, x)

    carry, dy = stage._leave(carry, tick, y)
    cotangent = (dy, stage.report_gradient)
    (dx,) = vjp(cotangent)
    carry = stage._enter_gradient(carry, tick, dx)
    return carry, dx


def _run_weight_gradient(stage: StageOperations, carry: Carry, tick: Tick) -> tuple[Carry, Hidden]:
    x = stage._input(carry, tick)

    def forward(outer: Any, chunk: Any) -> tuple[Hidden, Any]:
        return stage._forward(tick, outer, chunk, x)

    chunk = stage._chunk(tick)
    _, vjp = jax.vjp(forward, stage.outer, chunk)

    dy = carry.gradients[tick.gradient_slot]
    cotangent = (dy, stage.report_gradient)
    d_outer, d_chunk = vjp(cotangent)
    carry = stage._add_layers(carry, tick, d_outer, d_chunk)
    return carry, jnp.zeros_like(x)


_OPERATIONS: dict[Kind, Operate] = {
    Kind.IDLE: _idle,
    Kind.FORWARD: _run_forward,
    Kind.BACKWARD: _run_backward,
    Kind.INPUT_GRADIENT: _run_input_gradient,
    Kind.WEIGHT_GRADIENT: _run_weight_gradient,
}

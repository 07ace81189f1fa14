"""One device of a pipeline: it goes through the ticks of a schedule, and sends what it makes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from research.parallel.mesh_axes import PIPELINE_AXIS
from research.parallel.pipeline_operations import (
    Carry,
    Hidden,
    PipelineResult,
    StageOperations,
    Tick,
)
from research.parallel.pipeline_schedule import Kind, PipelineSchedule
from research.parallel.pipeline_slots import PipelineTables, make_tables


@dataclasses.dataclass(frozen=True)
class PipelineDevice:
    """One device's part of a pipeline.

    Attributes:
      schedule: of all devices.
      stage: what this one does.
    """

    schedule: PipelineSchedule
    stage: StageOperations

    def run(self) -> PipelineResult:
        """Goes through the ticks; gradients of what is no stage are summed over the devices."""
        tables = make_tables(self.schedule)
        place = jax.lax.axis_index(PIPELINE_AXIS)
        rows = []
        for name in Tick._fields:
            table = jnp.asarray(getattr(tables, name))
            if table.ndim == 2:
                # [ticks, devices] -> [ticks]
                table = table[:, place]
            rows.append(table)

        ticks = Tick(*rows)
        empty = self._empty(tables)
        carry, _ = jax.lax.scan(self._tick, empty, ticks)

        # The first and the last device add to the gradients of what is no stage, and where both
        # read one array, such as a tied embedding, their gradients add up.
        shared = (carry.value, carry.sums, carry.outer)
        value, sums, outer = jax.lax.psum(shared, PIPELINE_AXIS)
        return PipelineResult(
            value=value,
            sums=sums,
            report=carry.report,
            outer=outer,
            layers=carry.layers,
        )

    def _empty(self, tables: PipelineTables) -> Carry:
        """Returns zeros."""
        stage = self.stage
        # Traced, not computed: only the shapes of what the parts give are needed.
        index = jnp.zeros((), jnp.int32)
        first = stage.model.microbatch(stage.inputs, index)
        chunk = jax.tree.map(lambda x: x[0], stage.layers)
        hidden = jax.eval_shape(stage.model.enter, stage.outer, first)
        own = stage.split.layers_of(index)
        arguments = (stage.outer, chunk, own, hidden, first)
        _, report = jax.eval_shape(stage.model.run_stage, *arguments)
        value, sums = jax.eval_shape(stage.model.leave, stage.outer, hidden, first)

        def zeros(tree: Any, *leading: int) -> Any:
            def zero(x: Any) -> Array:
                shape = (*leading, *x.shape)
                return jnp.zeros(shape, x.dtype)

            return jax.tree.map(zero, tree)

        # One slot more than are used, for what nobody needs.
        inputs = zeros(hidden, tables.input_slots + 1)
        gradients = zeros(hidden, tables.gradient_slots + 1)
        carry = Carry(
            inputs=inputs,
            gradients=gradients,
            value=zeros(value),
            sums=zeros(sums),
            report=zeros(report, self.schedule.chunks),
            outer=zeros(stage.outer),
            layers=zeros(stage.layers),
        )
        return stage.laid_out_carry(carry)

    def _tick(self, carry: Carry, tick: Tick) -> tuple[Carry, None]:
        """Does what this device has to do, and exchanges results with its neighbours.

        Where all devices that do something do the same, the others do it too, on what they have,
        and keep nothing of it: collectives inside operations are then called by all devices.
        """
        # The schedule's kinds, such as IDLE, FORWARD and BACKWARD, and the branch of each.
        kinds = self.schedule.kinds
        branch_of_kind = [0] * len(Kind)
        for branch, kind in enumerate(kinds):
            branch_of_kind[kind] = branch
        branches = jnp.array(branch_of_kind)
        operations = [self.stage.operation(kind, tick) for kind in kinds]

        def each_its_own(carry: Carry) -> tuple[Carry, Hidden]:
            own = branches[tick.kind]
            return jax.lax.switch(own, operations, carry)

        # IDLE in common is a tick of different kinds.
        together = list(operations)
        if self.schedule.has_mixed_ticks:
            together[0] = each_its_own
        common = branches[tick.common_kind]
        carry, sent = jax.lax.switch(common, together, carry)

        # A device that has nothing for a neighbour sends it something that it puts aside.
        after = self._rotated(sent, 1, tick.sends_forward)
        before = self._rotated(sent, -1, tick.sends_backward)
        inputs = carry.inputs.at[tick.received_input].set(after)
        gradients = carry.gradients.at[tick.received_gradient].set(before)
        return carry._replace(inputs=inputs, gradients=gradients), None

    def _rotated(self, sent: Hidden, step: int, is_needed: Array) -> Hidden:
        """Returns what the device `step` places before this one sends, if any device needs it."""
        devices = self.schedule.devices
        pairs = [(place, (place + step) % devices) for place in range(devices)]

        def rotate(x: Hidden) -> Hidden:
            arrived = jax.lax.ppermute(x, PIPELINE_AXIS, pairs)
            return self.stage.laid_out(arrived)

        def nothing(x: Hidden) -> Hidden:
            zeros = jnp.zeros_like(x)
            return self.stage.laid_out(zeros)

        # All devices agree on it.
        return jax.lax.cond(is_needed, rotate, nothing, sent)

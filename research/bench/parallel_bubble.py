"""The bubble of each pipeline schedule, by the clock: stages that sleep instead of computing.

Eight host devices share the cores of one machine, so that a stage that waits leaves its core to
another one, and no time is lost. Sleeping needs no core: here a stage's forward pass takes `SLEEP`
seconds, and so do the gradient of its input and that of its parameters. A backward pass computes
its forward pass again, and sleeps for it: f = 1, b = 2 and w = 1. The loop over the ticks, its
branches and its exchanges are those of every pipelined step.

What a microbatch takes once the pipeline is full is measured too, as the difference of a step with
M of them and one with 2M. The rest of a step is waiting.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from research.parallel.mesh_axes import PIPELINE_AXIS
from research.parallel.pipeline import StagedModel, run_pipeline
from research.parallel.pipeline_schedule import Name, make_schedule
from research.parallel.stages import LayerRange, StageSplit

SLEEP = 0.03
COSTS = (1.0, 2.0, 1.0)
CHUNKS = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zero_bubble": 1}


def sleep(x: Float[Array, "..."], seconds: float) -> Float[Array, "..."]:
    """Returns its argument, some time later."""

    def wait(first: Any) -> np.ndarray:
        time.sleep(seconds)
        return np.zeros((), np.float32)

    shape = jax.ShapeDtypeStruct((), jnp.float32)
    first = x.reshape(-1)[0]
    return x + jax.pure_callback(wait, shape, first)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _layer(
    scale: Float[Array, ""], x: Float[Array, "B T D"], seconds: float
) -> Float[Array, "B T D"]:
    return sleep(scale * x, seconds)


def _layer_forward(scale: Array, x: Array, seconds: float) -> tuple[Array, tuple[Array, ...]]:
    y = sleep(scale * x, seconds)
    return y, (scale, x, y)


def _layer_backward(seconds: float, residuals: tuple[Array, ...], g: Array) -> tuple[Array, Array]:
    scale, x, y = residuals
    # The gradient of the input waits for the forward pass, that of the parameters does not.
    after_forward = g + 0 * y
    dx = sleep(scale * after_forward, seconds)
    d_scale = sleep(jnp.sum(g * x), seconds)
    return d_scale, dx


_layer.defvjp(_layer_forward, _layer_backward)


def pipeline_step(name: Name, devices: int, microbatches: int) -> Callable[[], None]:
    """Returns a step of a pipeline whose stages sleep; a call waits for its end."""
    chunks = CHUNKS[name]
    schedule = make_schedule(name, devices, microbatches, chunks)
    # A layer a stage, of as long a tick in every schedule.
    stages = devices * chunks

    def microbatch(inputs: Array, index: Int[Array, ""]) -> Array:
        return inputs[index]

    def enter(outer: Array, micro: Array) -> Array:
        return outer * micro

    def run_stage(
        outer: Array, layers: Array, own: LayerRange, x: Array, micro: Array
    ) -> tuple[Array, Array]:
        return _layer(layers[0], x, SLEEP), jnp.zeros(layers.shape)

    def leave(outer: Array, x: Array, micro: Array) -> tuple[Array, Any]:
        return jnp.sum(x), {}

    model = StagedModel(microbatch, enter, run_stage, leave, (None, None, None))
    split = StageSplit(stages, 1, devices, chunks)
    # A callback runs where no axis is left to the partitioner: the mesh has this one alone.
    mesh = jax.make_mesh((devices,), (PIPELINE_AXIS,), axis_types=(AxisType.Auto,))
    inputs = jnp.ones((microbatches, 1, 1, 8))
    layers = jnp.ones(stages)
    report_gradient = jnp.zeros(split.places)

    @jax.jit
    def gradients(layers: Array, inputs: Array) -> Any:
        outer = jnp.ones(())
        return run_pipeline(schedule, model, outer, layers, inputs, report_gradient, split)

    def take() -> None:
        with jax.set_mesh(mesh):
            result = gradients(layers, inputs)
        jax.block_until_ready(result)

    return take


def measure(name: Name, devices: int, microbatches: int, rounds: int) -> float:
    """Returns the share of a step in which a device waits, by the shortest step of some rounds.

    Whatever else the machine does makes a step longer, and none shorter.
    """
    once = pipeline_step(name, devices, microbatches)
    twice = pipeline_step(name, devices, 2 * microbatches)
    for take in (once, twice):
        # Compiles.
        take()
    times: list[list[float]] = [[], []]
    for _ in range(rounds):
        for found, take in zip(times, (once, twice), strict=True):
            found.append(_seconds(take))

    # 1f1b, 4 stages and 8 microbatches: 11 pairs of ticks, and 19 with twice as many; so 8 of the
    # 11 are work.
    shortest, longer = map(min, times)
    work = longer - shortest
    return 1 - work / shortest


def _seconds(take: Callable[[], None]) -> float:
    start = time.perf_counter()
    take()
    return time.perf_counter() - start

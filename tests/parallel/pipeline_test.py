"""A pipeline gives the value and every gradient of the model without one."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.parallel.pipeline import StagedModel, run_pipeline
from research.parallel.pipeline_schedule import make_schedule
from research.parallel.stages import LayerRange, StageSplit
from research.training.config import PipelineConfig
from tests.models.variants import VARIANTS
from tests.parallel.products import assert_equal_runs, build, train

EVERY_LAYER = LayerRange(jnp.int32(0), None)
WIDTH, LAYERS, ROWS, LENGTH = 4, 8, 2, 3
# What the loss makes of each layer's report.
REPORT_WEIGHT = 0.25


def normal(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def enter(outer: Any, micro: Any) -> jax.Array:
    return micro["x"] @ outer["table"]


def run_stage(outer: Any, layers: Any, own: LayerRange, x: jax.Array, micro: Any) -> Any:
    """Layers that differ by their index, and read what is no stage."""

    def layer(x: jax.Array, scanned: Any) -> tuple[jax.Array, jax.Array]:
        kernel, place = scanned
        index = (own.first + place).astype(jnp.float32)
        y = x + jnp.tanh(x @ kernel * outer["scale"] + 0.1 * index)
        report = jnp.mean(y**2)
        if own.count is None:
            return y, report
        is_layer = place < own.count
        return jnp.where(is_layer, y, x), jnp.where(is_layer, report, 0)

    return jax.lax.scan(layer, x, (layers, jnp.arange(layers.shape[0])))


def leave(outer: Any, x: jax.Array, micro: Any) -> tuple[jax.Array, Any]:
    # The output projection is the table of `enter`.
    error = jnp.sum((x @ outer["table"].T - micro["y"]) ** 2)
    return error, {"error": error, "rows": jnp.float32(ROWS)}


MODEL = StagedModel(
    microbatch=lambda inputs, index: {name: x[index] for name, x in inputs.items()},
    enter=enter,
    run_stage=run_stage,
    leave=leave,
)
OUTER = {"table": normal(0, WIDTH, WIDTH), "scale": jnp.float32(0.7)}
STACKED = 0.4 * normal(1, LAYERS, WIDTH, WIDTH)


def inputs(microbatches: int) -> dict[str, jax.Array]:
    return {
        "x": normal(2, microbatches, ROWS, LENGTH, WIDTH),
        "y": normal(3, microbatches, ROWS, LENGTH, WIDTH),
    }


def plain(microbatches: int, num_layers: int) -> tuple[Any, Any, Any]:
    """The value with what reports add, the sums and reports, and gradients, without stages."""

    def total(outer: Any, layers: Any) -> tuple[jax.Array, Any]:
        value = jnp.zeros(())
        reports = jnp.zeros(num_layers)
        for index in range(microbatches):
            micro = MODEL.microbatch(inputs(microbatches), index)
            x, report = run_stage(outer, layers, EVERY_LAYER, enter(outer, micro), micro)
            value += leave(outer, x, micro)[0]
            reports += report
        return value + REPORT_WEIGHT * reports.sum(), (value, reports)

    gradient = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)
    (_, (value, reports)), gradients = jax.jit(gradient)(OUTER, STACKED[:num_layers])
    return value, reports, gradients


@pytest.mark.parametrize(
    ("name", "devices", "microbatches", "chunks", "layers", "period"),
    [
        ("gpipe", 4, 3, 1, 8, 1),
        ("1f1b", 4, 6, 1, 8, 2),
        ("1f1b", 8, 4, 1, 8, 1),
        ("1f1b", 2, 1, 1, 8, 1),
        ("interleaved", 2, 4, 2, 8, 1),
        ("interleaved", 4, 4, 2, 8, 1),
        ("gpipe", 2, 4, 4, 8, 1),
        ("zero_bubble", 4, 8, 1, 8, 1),
        ("zero_bubble", 8, 3, 1, 8, 1),
        # Stages of 2, 2, 2 and 1 layers; of 4 and 3; of 2, 2, 1 and 1; of 2, 2, 2 and 1.
        ("gpipe", 4, 3, 1, 7, 1),
        ("1f1b", 2, 4, 1, 7, 2),
        ("zero_bubble", 4, 8, 1, 6, 1),
        ("interleaved", 2, 2, 2, 7, 1),
    ],
    ids=str,
)
def test_each_schedule_gives_the_gradients_of_the_plain_step(
    name: str, devices: int, microbatches: int, chunks: int, layers: int, period: int
):
    mesh = make_mesh(MeshConfig(pipeline=devices))
    schedule = make_schedule(name, devices, microbatches, chunks)
    split = StageSplit(layers, period, devices, chunks)
    weights = jnp.full(split.places, REPORT_WEIGHT)
    with jax.set_mesh(mesh):
        found = jax.jit(lambda *trees: run_pipeline(schedule, MODEL, *trees, split))(
            OUTER, STACKED[:layers], inputs(microbatches), weights
        )
    value, reports, (outer, layer_gradients) = plain(microbatches, layers)
    np.testing.assert_allclose(found.value, value, rtol=1e-5)
    np.testing.assert_allclose(found.sums["error"], value, rtol=1e-5)
    assert found.sums["rows"] == ROWS * microbatches
    np.testing.assert_allclose(found.report, reports, rtol=1e-5)
    for part, expected in outer.items():
        np.testing.assert_allclose(found.outer[part], expected, rtol=1e-4, err_msg=part)
    np.testing.assert_allclose(found.layers, layer_gradients, rtol=1e-4, atol=1e-5)


MESHES = {
    "1f1b": (PipelineConfig(), {"pipeline": 2, "tensor": 2, "context": 2}),
    "1f1b of experts": (PipelineConfig(), {"pipeline": 2, "expert": 2, "tensor": 2}),
    "gpipe": (PipelineConfig("gpipe"), {"pipeline": 4, "fsdp": 2}),
    # 11 layers in rounds of two: stages of 4, 4, 2 and 1; 7 layers: stages of 4 and 3.
    "uneven gpipe": (PipelineConfig("gpipe"), {"pipeline": 4, "fsdp": 2}),
    "uneven 1f1b of experts": (PipelineConfig(), {"pipeline": 2, "expert": 2, "tensor": 2}),
    "interleaved": (PipelineConfig("interleaved", 2), {"pipeline": 2, "fsdp": 2, "tensor": 2}),
    "zero bubble": (PipelineConfig("zero_bubble"), {"pipeline": 4, "fsdp": 2}),
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", MESHES)
def test_a_model_on_stages_gives_the_run_of_one_device(name: str):
    pipeline, sizes = MESHES[name]
    variant = VARIANTS["experts" if "experts" in name else "windows"]
    # 8 layers of windows, in rounds of two
    num_layers = 4 * len(variant.pattern)
    if "uneven" in name:
        num_layers += 3
    model = dataclasses.replace(variant, dropout=0.1, layer_loop="scan", num_layers=num_layers)
    mesh = MeshConfig(**({"data": 1} | sizes))
    found = train(model, mesh, accumulation=4, pipeline=pipeline)
    assert_equal_runs(found, train(model, MeshConfig(), jax.devices()[:1], accumulation=4), model)


@pytest.mark.parametrize(
    ("change", "sizes", "pipeline", "message"),
    [
        (
            {"num_layers": 4, "pattern": VARIANTS["windows"].pattern},
            {"pipeline": 4},
            PipelineConfig(),
            "mesh.pipeline × train.pipeline.chunks = 4 is more than the 2 rounds of 2 layers",
        ),
        (
            {"num_layers": 4},
            {"pipeline": 2},
            PipelineConfig("interleaved", 4),
            "mesh.pipeline × train.pipeline.chunks = 8 is more than the 4 layers of the model",
        ),
        (
            {"num_layers": 4},
            {"pipeline": 2, "context": 2},
            PipelineConfig("zero_bubble"),
            "mesh.context = 2 must be 1 with train.pipeline.schedule = 'zero_bubble'",
        ),
    ],
)
def test_layers_that_do_not_fit_the_stages_are_refused(change, sizes, pipeline, message: str):
    model = dataclasses.replace(VARIANTS["sinks"], layer_loop="scan", **change)

    def trace() -> None:
        devices = jax.devices()[: math.prod(sizes.values())]
        mesh = MeshConfig(**({"data": 1} | sizes))
        program = build(model, mesh, devices, accumulation=4, pipeline=pipeline)
        with jax.set_mesh(program.mesh):
            jax.eval_shape(program.train_step, program.state, {}, program.batch)

    with pytest.raises(UserError) as caught:
        trace()
    assert str(caught.value).startswith(message)

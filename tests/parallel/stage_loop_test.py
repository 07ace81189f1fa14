"""Stages that JAX differentiates through give the run of one device, and evaluate as it does."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.core.trees import named_leaves
from research.data.objectives import ObjectiveConfig
from research.kernels.attention import AttentionMask
from research.models.config import ModelConfig
from research.models.context import Context
from research.optim.optimizers import OptimConfig
from research.optim.schedules import ScheduleConfig
from research.parallel.mesh_config import MeshConfig
from research.scaling.collectives import collectives
from research.training.config import PipelineConfig, TrainConfig
from research.training.language_model import language_model_program
from research.training.partition import TrainableConfig
from research.training.program import Program
from research.training.staged_loop import StagedLoop
from research.training.step import shard_batch
from tests.models.variants import VARIANTS
from tests.parallel.products import LENGTH, OBJECTIVES, ROWS, host_batch

# Two stages of four layers; three stages have 2, 1 and 1 of them, and 2, 2 and 1 of five.
ENCODER_DECODER = dataclasses.replace(
    VARIANTS["encoder-decoder"], layer_loop="scan", num_layers=4, encoder_layers=5
)
EXPERTS = dataclasses.replace(VARIANTS["experts"], layer_loop="scan", num_layers=4)
DENSE = dataclasses.replace(VARIANTS["sinks"], layer_loop="scan", num_layers=4)
IN_PART = TrainableConfig("pattern", pattern="mlp/|embed")


def program_of(model: ModelConfig, sizes: dict[str, int], **options: Any) -> Program:
    """A run on as many devices as the sizes take."""
    optim = OptimConfig(learning_rate=3e-3, epsilon=1e-4, schedule=ScheduleConfig(name="constant"))
    config = TrainConfig(
        steps=2,
        batch_size=ROWS,
        sequence_length=LENGTH,
        accumulation=2,
        **{"pipeline": PipelineConfig("gpipe"), **options},
    )
    mesh = MeshConfig(**({"data": 1} | sizes))
    devices = jax.devices()[: math.prod(sizes.values())]
    objective = ObjectiveConfig(kind=OBJECTIVES[model.structure])
    return language_model_program(model, optim, config, mesh, devices, objective)


def batch_of(program: Program, model: ModelConfig) -> Any:
    batch = host_batch(model, 0)
    return shard_batch({name: batch[name] for name in program.batch}, program.batch)


def step(program: Program, model: ModelConfig) -> tuple[dict[str, float], dict[str, Any], Any]:
    """The metrics of a step, its parameters before and after it."""
    key = jax.random.key(7)
    with jax.set_mesh(program.mesh):
        state = program.create(key)
        frozen = program.create_frozen(key)
        before = jax.tree.map(np.asarray, state.params)
        after, metrics = program.compile_train_step()(state, frozen, batch_of(program, model))
    found = {name: float(value) for name, value in metrics.items()}
    return found, named_leaves(before), named_leaves(after.params)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("model", "sizes", "options"),
    [
        (ENCODER_DECODER, {"pipeline": 2, "fsdp": 2, "tensor": 2}, {}),
        (ENCODER_DECODER, {"pipeline": 3, "context": 2}, {}),
        (EXPERTS, {"pipeline": 2, "expert": 2, "tensor": 2}, {"trainable": IN_PART}),
    ],
    ids=["encoder-decoder", "uneven", "trained in part"],
)
def test_a_model_that_is_not_cut_into_parts_gives_the_step_of_one_device(model, sizes, options):
    metrics, _, params = step(program_of(model, sizes, **options), model)
    expected, before, others = step(program_of(model, {}, **options), model)
    assert metrics == pytest.approx(expected, abs=1e-5, rel=1e-5)
    for name, array in params.items():
        np.testing.assert_allclose(np.asarray(array), others[name], atol=1e-5, err_msg=name)
    # The control: a step moves most parameters by far more than the tolerance.
    moved = [np.abs(np.asarray(others[name]) - before[name]).max() for name in others]
    assert np.median(moved) > 1e-3


def test_evaluation_runs_each_layer_on_its_stage():
    program = program_of(DENSE, {"pipeline": 4, "tensor": 2})
    alone = program_of(DENSE, {})
    key = jax.random.key(7)
    sums = []
    for each in (program, alone):
        with jax.set_mesh(each.mesh):
            state = each.create(key)
            compiled = each.compile_eval_step()
            found = compiled(state.eval_params(), {}, batch_of(each, DENSE))
            sums.append({name: float(value) for name, value in found.items()})
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)

    # No parameter of a layer goes to another stage: hidden states do, and the last ones.
    with jax.set_mesh(program.mesh):
        text = program.compile_eval_step().as_text()
    found = [each for each in collectives(text, program.mesh) if "pipeline" in each.axes]
    assert {each.kind for each in found} == {"collective-permute", "all-reduce"}


def test_a_schedule_that_needs_one_stack_of_layers_is_refused_for_two():
    with pytest.raises(UserError) as caught:
        program_of(ENCODER_DECODER, {"pipeline": 2}, pipeline=PipelineConfig("1f1b"))
    assert str(caught.value) == (
        "train.pipeline.schedule = '1f1b' needs one stack of layers and all parameters trained. "
        "Use 'gpipe' without chunks."
    )


def test_a_microbatch_has_its_rows_of_the_context_and_its_own_dropout():
    positions = jnp.arange(12).reshape(4, 3)
    context = Context(positions, AttentionMask(causal=True), key=jax.random.key(3))
    loop = StagedLoop(devices=2, microbatches=2)
    found = [loop._context_of(context, 4, jnp.int32(index)) for index in range(2)]
    np.testing.assert_array_equal(found[0].positions, positions[0::2])
    np.testing.assert_array_equal(found[1].positions, positions[1::2])
    keys = [jax.random.key_data(each.key).tolist() for each in found]
    assert keys[0] != keys[1]
    assert loop._context_of(dataclasses.replace(context, key=None), 4, jnp.int32(0)).key is None

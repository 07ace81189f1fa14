"""Our own training step has no accidents on any kind of mesh; steps with seeded ones do."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from research.models import layer_loops, layers
from research.models.config import AttentionConfig, ExpertsConfig, MlpConfig, ModelConfig
from research.optim.optimizers import OptimConfig
from research.optim.schedules import ScheduleConfig
from research.parallel.mesh_config import MeshConfig, SlicesConfig
from research.scaling.accidents import ProgramArrays, replications, unexpected
from research.scaling.array_forms import TableArray
from research.scaling.collectives import read_collectives
from research.scaling.hlo import parse_module
from research.training.config import TrainConfig
from research.training.language_model import language_model_program
from research.training.program import Program
from tests.parallel.accidents import assert_no_accidents, find_accidents
from tests.tiny import tiny_config

# Sizes that no product of eight devices makes equal to each other.
MODEL = dataclasses.replace(
    tiny_config(num_layers=3),
    vocab_size=176,
    embed_dim=48,
    attention=AttentionConfig(8, 8, 6),
    mlp=MlpConfig(hidden_dim=112),
    layer_loop="scan",
)
EXPERTS = dataclasses.replace(MODEL, experts=ExpertsConfig(8, 3, hidden_dim=80), remat="full")
ROWS, LENGTH = 16, 40


def program(mesh: MeshConfig, model: ModelConfig = MODEL, accumulation: int = 1) -> Program:
    optim = OptimConfig(learning_rate=1e-3, schedule=ScheduleConfig(name="constant"))
    train = TrainConfig(steps=5, batch_size=ROWS, sequence_length=LENGTH, accumulation=accumulation)
    return language_model_program(model, optim, train, mesh)


def sizes(**axes: int) -> MeshConfig:
    return MeshConfig(**({"data": 1} | axes))


CLEAN = {
    "data": (sizes(data=8), MODEL),
    "fsdp": (sizes(fsdp=8), MODEL),
    "tensor": (sizes(tensor=8), MODEL),
    "context": (sizes(context=8), MODEL),
    "data-fsdp-tensor": (sizes(data=2, fsdp=2, tensor=2), MODEL),
    "fsdp-context-tensor": (sizes(fsdp=2, context=2, tensor=2), MODEL),
    "zero-1": (sizes(fsdp=4, tensor=2, zero=1), MODEL),
    "zero-2": (sizes(fsdp=4, tensor=2, zero=2), MODEL),
    "expert": (sizes(fsdp=2, expert=4), EXPERTS),
    "expert-tensor-context": (sizes(expert=2, tensor=2, context=2), EXPERTS),
    "unrolled": (sizes(fsdp=4, tensor=2), dataclasses.replace(MODEL, layer_loop="unroll")),
}


@pytest.mark.fast_cases("fsdp-context-tensor")
@pytest.mark.parametrize(("mesh", "model"), CLEAN.values(), ids=CLEAN)
def test_training_step_has_no_accidents(mesh: MeshConfig, model: ModelConfig):
    built = program(mesh, model)
    assert_no_accidents(built.compile_train_step(), built, model)


def found(changed: Program, model: ModelConfig = MODEL, **options: Any) -> set[str]:
    """What is found in a step, by the start of what it says."""
    findings = find_accidents(changed.compile_train_step(), changed, model, **options)
    return {finding.what for finding in findings}


def lay_out(tree: Any, spec: P) -> Any:
    """A constraint that should not be there; parameters are also made without a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, spec), tree)


FSDP_TENSOR = sizes(data=2, fsdp=2, tensor=2)


def test_replicated_activation_is_found(monkeypatch: pytest.MonkeyPatch):
    project = layers.project
    monkeypatch.setattr(
        layers, "project", lambda x, *args, **options: project(lay_out(x, P()), *args, **options)
    )
    what = found(program(FSDP_TENSOR))
    assert any("_norm" in each and "f32[640,48] on each device" in each for each in what), what


def test_stack_that_is_gathered_before_its_loop_is_found(monkeypatch: pytest.MonkeyPatch):
    run = layer_loops.Scanned.run

    def gather(self: Any, group: Any, *args: Any) -> Any:
        return run(self, dataclasses.replace(group, params=lay_out(group.params, P())), *args)

    monkeypatch.setattr(layer_loops.Scanned, "run", gather)
    what = found(program(FSDP_TENSOR))
    assert any(each.startswith("all layers of layers/mlp/down/kernel") for each in what), what


def test_gathered_kernels_that_are_kept_of_all_layers_are_found():
    # Without remat the experts' own gradient keeps each layer's gathered kernels: true of our step.
    kept = dataclasses.replace(EXPERTS, remat="none")
    what = found(program(sizes(fsdp=2, expert=4), kept), kept)
    assert any(each.startswith("layers/mlp/experts/down/kernel") for each in what), what


def test_activation_that_moves_to_another_axis_is_found(monkeypatch: pytest.MonkeyPatch):
    run = layer_loops.Scanned.run

    def move(self: Any, group: Any, x: Any, *args: Any) -> Any:
        return run(self, group, lay_out(x, P(None, ("data", "fsdp"))), *args)

    monkeypatch.setattr(layer_loops.Scanned, "run", move)
    what = found(program(FSDP_TENSOR))
    assert any("is moved between devices" in each for each in what), what


def test_tensor_parallelism_over_the_slow_network_is_found():
    built = program(FSDP_TENSOR)
    assert not found(built, slices=SlicesConfig(data=2))
    # The same program on a mesh whose neighbours along tensor are in different slices.
    devices = np.array(jax.devices()).reshape(2, 4).T.reshape(built.mesh.devices.shape)
    crossed = dataclasses.replace(built, mesh=Mesh(devices, built.mesh.axis_names))
    compiled = built.compile_train_step()
    what = {
        finding.what
        for finding in find_accidents(compiled, crossed, MODEL, slices=SlicesConfig(data=2))
    }
    assert "tensor runs over the network between slices" in what


def test_collective_that_is_not_expected_is_found():
    built = program(sizes(tensor=8))
    assert not found(built, expected={("all-reduce", ("tensor",))})
    assert found(built, expected=set()) == {"it is not among the expected collectives"}


def test_only_sums_of_the_named_modules_are_expected_everywhere():
    built = program(sizes(tensor=8))
    text = built.compile_train_step().as_text()
    moved = read_collectives(parse_module(text), built.mesh, SlicesConfig())
    where = [finding.where for finding in unexpected(moved, set())]
    others = [finding.where for finding in unexpected(moved, set(), ("mlp",))]
    assert any("/mlp/" in each for each in where)
    assert any("/attention/" in each for each in others)
    assert others == [each for each in where if "/mlp/" not in each or "all-reduce" not in each]


def test_only_the_partitioner_replicates_an_activation():
    mesh = program(sizes(fsdp=8)).mesh
    hidden = TableArray("hidden", ("batch", "embed"), (512, 1024), P("fsdp", None))
    arrays = ProgramArrays(mesh, activations=(hidden,))
    text = """HloModule step

ENTRY main {
  x = f32[512,1024]{1,0} parameter(0)
  ROOT y = f32[512,1024]{1,0} add(x, x), metadata={op_name="jit(step)/NAME/add"}
}
"""
    (finding,) = replications(parse_module(text.replace("NAME", "mlp")), arrays)
    assert finding.what.startswith("hidden, sharded as ")
    assert not list(replications(parse_module(text.replace("NAME", "shard_map")), arrays))
    # Bytes of half a million numbers that are copied.
    copied = text.replace("NAME", "mlp").replace("f32[512,1024]", "s8[524288]")
    copied = copied.replace("{1,0}", "{0}").replace("add(x, x)", "copy(x)")
    as_bytes = dataclasses.replace(arrays, large=2**10)
    assert not list(replications(parse_module(copied), as_bytes))

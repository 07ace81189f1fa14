"""A ZeRO level changes where parameters, gradients and the optimizer's state lie, and no value."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest

from research.core.errors import UserError
from research.core.trees import named_leaves
from research.models.config import AttentionConfig, ModelConfig
from research.optim.optimizers import OptimConfig
from research.optim.schedules import ScheduleConfig
from research.parallel.mesh_config import MeshConfig, SlicesConfig
from research.scaling.collectives import Collective, collectives
from research.scaling.topology import tpu_devices
from research.training.checkpoints import CheckpointConfig, Checkpoints
from research.training.config import TrainConfig
from research.training.language_model import language_model_program
from research.training.program import Program
from research.training.step import shard_batch
from tests.models.variants import VARIANTS
from tests.parallel.training_test import begin, host_batch
from tests.tiny import tiny_config

STEPS, ROWS, LENGTH = 5, 16, 8
DENSE = dataclasses.replace(tiny_config(num_layers=1), attention=AttentionConfig(8, 8, 2))
MODELS = {
    "dense": DENSE,
    "experts": dataclasses.replace(VARIANTS["experts"], num_layers=1),
    "scanned": dataclasses.replace(DENSE, num_layers=2, layer_loop="scan"),
}
MESHES: dict[str, dict[str, Any]] = {
    "data fsdp tensor": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp context": {"data": 1, "fsdp": 4, "context": 2},
    "data fsdp expert": {"data": 2, "fsdp": 2, "expert": 2},
    "two slices": {"data": 2, "fsdp": 2, "tensor": 2, "slices": SlicesConfig(data=2)},
}
# Rates at which five steps move parameters by more than 1e-3 and amplify no rounding.
RATES = {"adamw": 3e-3, "adafactor": 3e-3, "lion": 1e-3, "sgd": 0.05, "muon": 3e-3}
# One device agrees with eight to this, absolute below 1 and relative above.
TOLERANCE = 1e-5


def program(
    name: str, mesh: MeshConfig, model: ModelConfig, accumulation: int, devices: Any = None
) -> Program:
    optim = OptimConfig(
        name=name,
        learning_rate=RATES[name],
        epsilon=1e-4,
        schedule=ScheduleConfig(name="constant"),
        weight_decay=0.0 if name == "sgd" else 0.1,
        clip_norm=None if name == "sgd" else 0.5,
        ema_decay=0.9,
    )
    config = TrainConfig(
        steps=STEPS, batch_size=ROWS, sequence_length=LENGTH, accumulation=accumulation
    )
    return language_model_program(model, optim, config, mesh, devices)


@functools.lru_cache
def train(
    name: str, model: str, mesh: MeshConfig, accumulation: int = 1, devices: int = 8
) -> tuple[list[dict[str, float]], list[dict[str, np.ndarray]]]:
    """The metrics of each step, and the state before the first step, after it, and at the end."""
    parts = program(name, mesh, MODELS[model], accumulation, jax.devices()[:devices])
    step, state, metrics = parts.compile_train_step(), begin(parts.state, MODELS[model]), []
    state = state.replace(ema=jax.tree.map(lambda leaf: leaf.copy(), state.params))
    state = jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, parts.state))
    states = [host(state)]
    for index in range(STEPS):
        state, row = step(state, {}, shard_batch(host_batch(index), parts.batch))
        metrics.append({key: float(value) for key, value in row.items()})
        if index in (0, STEPS - 1):
            states.append(host(state))
    return metrics, states


def host(state: Any) -> dict[str, np.ndarray]:
    return {name: np.array(leaf) for name, leaf in named_leaves(state).items()}


def gradients(states: list[dict[str, np.ndarray]], rate: float) -> dict[str, np.ndarray]:
    """The gradients of the first step of SGD without decay and clipping, which moves by
    rate · gradient.
    """
    first, second, _ = states
    return {
        name: (first[name] - second[name]) / rate for name in first if name.startswith("params/")
    }


def assert_same(found: Any, expected: Any, name: str) -> None:
    for row, other in zip(found[0], expected[0], strict=True):
        assert row == pytest.approx(other, abs=TOLERANCE, rel=TOLERANCE)
    assert found[1][-1].keys() == expected[1][-1].keys()
    for leaf, array in expected[1][-1].items():
        np.testing.assert_allclose(
            found[1][-1][leaf], array, atol=TOLERANCE, rtol=TOLERANCE, err_msg=leaf
        )
    if name == "sgd":
        others = gradients(expected[1], RATES[name])
        for leaf, array in gradients(found[1], RATES[name]).items():
            np.testing.assert_allclose(
                array, others[leaf], atol=TOLERANCE, rtol=TOLERANCE, err_msg=leaf
            )


# Each level with each optimizer and on each mesh.
CASES = [
    (1, "sgd", "data fsdp tensor", "dense"),
    (1, "adamw", "data fsdp tensor", "dense"),
    (1, "adafactor", "fsdp context", "dense"),
    (1, "lion", "data fsdp expert", "experts"),
    (1, "muon", "fsdp context", "dense"),
    (1, "adamw", "two slices", "dense"),
    (2, "sgd", "fsdp context", "dense"),
    (2, "adamw", "fsdp context", "dense"),
    (2, "adafactor", "data fsdp expert", "experts"),
    (2, "lion", "data fsdp tensor", "dense"),
    (2, "muon", "data fsdp tensor", "dense"),
    (2, "adamw", "two slices", "dense"),
    (3, "sgd", "data fsdp expert", "experts"),
    (3, "adamw", "data fsdp expert", "experts"),
    (3, "adafactor", "data fsdp tensor", "dense"),
    (3, "lion", "fsdp context", "dense"),
    (3, "muon", "data fsdp expert", "experts"),
    (3, "adamw", "two slices", "dense"),
]


@pytest.mark.fast_cases("1, sgd, data fsdp tensor, dense", "2, muon, data fsdp tensor, dense")
@pytest.mark.parametrize("case", CASES, ids=lambda case: ", ".join(map(str, case)))
def test_every_level_gives_the_run_of_one_device(case: tuple[int, str, str, str]):
    zero, name, mesh, model = case
    found = train(name, model, MeshConfig(**MESHES[mesh], zero=zero))
    expected = train(name, model, MeshConfig(), devices=1)
    assert_same(found, expected, name)
    # The control: the steps have moved every parameter by far more than the tolerance.
    first, _, last = found[1]
    moved = {leaf: np.abs(last[leaf] - first[leaf]).max() for leaf in first if "params" in leaf}
    assert min(moved.values()) > 1e-3, min(moved, key=moved.get)


@pytest.mark.thorough
@pytest.mark.parametrize("zero", [1, 2])
def test_sums_over_microbatches_of_scanned_layers_give_the_run_of_one_device(zero: int):
    mesh = MeshConfig(**MESHES["data fsdp tensor"], zero=zero)
    expected = train("adamw", "scanned", MeshConfig(), 2, devices=1)
    assert_same(train("adamw", "scanned", mesh, 2), expected, "adamw")


def bytes_on_a_device(tree: Any) -> int:
    return sum(
        leaf.dtype.itemsize * int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        for leaf in jax.tree.leaves(tree)
    )


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_a_device_holds_the_bytes_that_the_level_says(zero: int):
    parts = program("adamw", MeshConfig(**MESHES["data fsdp tensor"], zero=zero), DENSE, 1)
    # One layer: width 16, heads 8 × 2, MLP 24, vocabulary 48.
    kernels = 2 * 48 * 16 + 4 * 16 * 16 + 3 * 16 * 24
    scales = 3 * 16
    # Tensor shards kernels, and fsdp shards both.
    by_table = 4 * (kernels // 4 + scales // 2)
    without_width = 4 * (kernels // 2 + scales)
    assert bytes_on_a_device(parts.state.params) == (by_table if zero == 3 else without_width)
    assert bytes_on_a_device(parts.state.ema) == by_table
    # Two moments, and two counters.
    assert bytes_on_a_device(parts.state.opt_state) == 2 * by_table + 8
    # What the shapes promise is what lies on a device.
    state = begin(parts.state, DENSE)
    device = jax.devices()[0]
    held = [
        shard.data.nbytes
        for leaf in jax.tree.leaves(state)
        for shard in leaf.addressable_shards
        if shard.device == device
    ]
    assert sum(held) == bytes_on_a_device(parts.state)


def found_collectives(parts: Program, slices: SlicesConfig) -> tuple[Collective, ...]:
    return collectives(parts.compile_train_step().as_text(), parts.mesh, slices)


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_gradients_alone_go_between_slices_that_are_replicas(zero: int):
    """Hybrid sharding: parameters are sharded inside a slice, and each slice has all of them."""
    mesh = MeshConfig(**MESHES["two slices"], zero=zero)
    found = found_collectives(program("adamw", mesh, DENSE, 1), mesh.slices)
    assert {one.kind for one in found if one.crosses_slices} == {"all-reduce"}
    assert "all-gather" in {one.kind for one in found}


def test_parameters_sharded_over_slices_are_gathered_between_them():  # the control
    mesh = MeshConfig(data=2, fsdp=2, tensor=2, slices=SlicesConfig(fsdp=2))
    found = found_collectives(program("adamw", mesh, DENSE, 1), mesh.slices)
    assert "all-gather" in {one.kind for one in found if one.crosses_slices}


@pytest.mark.parametrize("zero", [1, 3])
def test_replicas_sum_a_device_s_part_of_experts_gradients(zero: int):
    mesh = MeshConfig(**MESHES["data fsdp expert"], zero=zero)
    model = MODELS["experts"]
    found = found_collectives(program("adamw", mesh, model, 1), mesh.slices)
    experts = model.experts.num_experts // 2
    sums: dict[tuple[str, ...], set[tuple[int, ...]]] = {}
    for one in found:
        if one.kind in ("all-reduce", "reduce-scatter"):
            dims = {shape.dims for shape in one.shapes if len(shape.dims) == 3}
            sums.setdefault((one.kind, *one.axes), set()).update(dims)
    # Of two devices along fsdp each has half of the width, and data sums that half.
    hidden, half = model.experts.hidden_dim, model.embed_dim // 2
    parts = {(experts, half, hidden), (experts, hidden, half)}
    assert parts <= sums["all-reduce", "data"]
    assert parts <= sums["reduce-scatter", "fsdp"]
    assert not sums.get(("all-reduce", "data", "fsdp"), set())


@pytest.mark.compilers
def test_gradients_are_reduced_as_the_level_says():
    model = dataclasses.replace(
        DENSE, embed_dim=128, num_layers=2, layer_loop="scan", vocab_size=512, dtype="bfloat16"
    )
    model = dataclasses.replace(
        model,
        attention=AttentionConfig(8, 8, 128),
        mlp=dataclasses.replace(model.mlp, hidden_dim=256),
    )
    scattered = {}
    for zero in (1, 2, 3):
        mesh = MeshConfig(data=1, fsdp=-1, zero=zero)
        parts = program("adamw", mesh, model, 1, tpu_devices("v5p"))
        found = found_collectives(parts, mesh.slices)
        scattered[zero] = {
            shape.dims for one in found if one.kind == "reduce-scatter" for shape in one.shapes
        }
    # Of 4 devices each keeps a quarter of the width, 128, of each matrix of a layer.
    matrices = {(32, 8, 128), (8, 128, 32), (256, 32), (32, 256)}
    assert not scattered[1] & matrices
    assert matrices <= scattered[2]
    assert matrices <= scattered[3]


def test_a_checkpoint_of_one_level_resumes_at_another(tmp_path):
    levels = {
        zero: program("adamw", MeshConfig(**MESHES["data fsdp tensor"], zero=zero), DENSE, 1)
        for zero in (1, 3)
    }
    state = begin(levels[1].state, DENSE)
    state = state.replace(ema=jax.tree.map(lambda leaf: leaf * 2, state.params))
    checkpoints = Checkpoints(tmp_path, CheckpointConfig())
    checkpoints.save(1, levels[1].merge(state, {}), {})
    _, restored, _ = checkpoints.restore(levels[3].saved)
    checkpoints.close()
    resumed, _ = levels[3].resume_or_create(restored, jax.random.key(0))
    for name, leaf in named_leaves(resumed).items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(named_leaves(state)[name]))
        assert leaf.sharding == named_leaves(levels[3].state)[name].sharding
    # The control: they lie in other places.
    kernel = ("layers_0", "mlp", "up", "kernel")
    before, after = (
        functools.reduce(lambda tree, key: tree[key], kernel, tree)
        for tree in (state.params, resumed.params)
    )
    assert before.addressable_shards[0].data.nbytes == 2 * after.addressable_shards[0].data.nbytes


def test_a_level_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match=r"^zero = 4 must be 1, 2 or 3\.$"):
        MeshConfig(zero=4)

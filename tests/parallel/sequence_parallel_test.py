"""`model.sequence_parallel` changes where hidden states lie, and no value."""

import dataclasses
import functools

import jax
import pytest

from research.core.errors import UserError
from research.data.objectives import CAUSAL
from research.inspection.activations import activation_groups
from research.models.config import ModelConfig
from research.parallel.mesh_config import MeshConfig
from research.training.mesh_checks import check_axes
from tests.models.variants import VARIANTS
from tests.parallel.products import Run, assert_equal_runs, build, train
from tests.tiny import tiny_config

SIZES = dict.fromkeys(("data", "fsdp", "pipeline", "context", "expert", "tensor"), 1)


def variant(name: str) -> ModelConfig:
    return dataclasses.replace(VARIANTS[name], dropout=0.1, layer_loop="scan", num_layers=4)


@functools.lru_cache
def alone(name: str) -> Run:
    return train(variant(name), MeshConfig(), jax.devices()[:1], accumulation=2)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("windows", {"tensor": 2, "context": 2, "fsdp": 2}),
        ("parallel pair", {"tensor": 2, "data": 4}),
        ("post-norm", {"tensor": 2, "fsdp": 2, "pipeline": 2}),
        ("experts", {"tensor": 2, "expert": 4}),
    ],
)
def test_tokens_sharded_between_sublayers_give_the_run_of_one_device(name: str, sizes):
    model = dataclasses.replace(variant(name), sequence_parallel=True)
    mesh = MeshConfig(**({"data": 1} | sizes))
    assert_equal_runs(train(model, mesh, accumulation=2), alone(name), model)


def test_norms_and_outputs_of_a_layer_have_a_share_of_the_tokens():
    mesh = build(tiny_config(), MeshConfig(tensor=2, context=2)).mesh.abstract_mesh
    shares = {}
    for sequence_parallel in (False, True):
        model = tiny_config(sequence_parallel=sequence_parallel)
        groups = activation_groups(model, CAUSAL, 8, 16, mesh)
        arrays = {array.name: array.mesh_axes[1] for group in groups for array in group.arrays}
        shares[sequence_parallel] = arrays
    for name in ("attention_norm", "mlp_norm", "attention/out", "mlp/down", "output"):
        assert shares[False][name] == ("context",)
        assert shares[True][name] == ("context", "tensor")
    # Inside a sublayer tensor shards its width.
    assert shares[True]["mlp/up"] == ("context",)


def test_a_length_that_the_devices_do_not_divide_is_refused():
    model = tiny_config(sequence_parallel=True)
    sizes = {**SIZES, "tensor": 2, "context": 2}
    check_axes(model, sizes, length=12)
    with pytest.raises(UserError) as caught:
        check_axes(model, sizes, length=14)
    assert str(caught.value) == (
        "train.sequence_length = 14 is not a multiple of mesh.context × mesh.tensor = 4, as "
        "model.sequence_parallel needs. Use 12."
    )
    check_axes(tiny_config(), sizes, length=14)

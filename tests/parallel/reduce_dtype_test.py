"""Gradients are summed over devices in the type that the config names, and in no other."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from research.core.errors import UserError
from research.core.trees import named_leaves
from research.kernels.projection import reference
from research.models.config import (
    AttentionConfig,
    ExpertsConfig,
    HeadConfig,
    LayerConfig,
    ModelConfig,
    NormConfig,
    PositionConfig,
)
from research.optim.optimizers import OptimConfig
from research.parallel.mesh_config import MeshConfig
from research.scaling.collectives import Collective, collectives
from research.scaling.topology import tpu_devices
from research.training.config import TrainConfig
from research.training.language_model import language_model_program
from research.training.program import Program
from research.training.step import shard_batch
from tests.parallel.training_test import begin, host_batch
from tests.tiny import tiny_config

ROWS, LENGTH = 16, 8
# A dense layer, a layer of experts, and every kind of parameter that a decoder can have.
EVERYTHING = tiny_config(
    attention={"qkv_bias": True, "out_bias": True, "sinks": True, "qk_norm": "head"},
    mlp={"bias": True},
    norm=NormConfig(bias=True),
    position=PositionConfig(kind="learned"),
    head=HeadConfig(mtp_depth=1),
    experts=ExpertsConfig(
        num_experts=4, experts_per_token=2, hidden_dim=128, shared_dim=12, router_bias=True
    ),
    first_layers=(LayerConfig(experts=False),),
    embed_dim=128,
    dtype="bfloat16",
)
RELATIVE = tiny_config(
    attention={"num_kv_heads": 4},
    position=PositionConfig(kind="relative"),
    num_layers=1,
    tied_embeddings=True,
    embed_dim=128,
    dtype="bfloat16",
)
DENSE = dataclasses.replace(
    tiny_config(num_layers=1, dtype="bfloat16"), attention=AttentionConfig(8, 8, 2)
)


def program(model: ModelConfig, dtype: str, mesh: MeshConfig, devices: Any = None, **options: int):
    config = TrainConfig(
        steps=2, batch_size=ROWS, sequence_length=LENGTH, reduce_dtype=dtype, **options
    )
    optim = OptimConfig(name="sgd", beta1=0.0, weight_decay=0.0, clip_norm=None)
    return language_model_program(model, optim, config, mesh, devices)


def compiled_for_tpu(model: ModelConfig, dtype: str) -> tuple[Program, str]:
    # Every device has all parameters, so that sums of gradients are all that devices exchange.
    parts = program(model, dtype, MeshConfig(data=-1), tpu_devices("v5p"))
    return parts, parts.compile_train_step().as_text()


def gradient_sums(parts: Program, text: str) -> list[Collective]:
    """The sums over devices: of gradients, and of a few numbers for the log."""
    return [
        one
        for one in collectives(text, parts.mesh)
        if one.kind in ("all-reduce", "reduce-scatter") and "data" in one.axes
    ]


def sums_in_bfloat16(parts: Program, text: str) -> list[str]:
    """The arrays of a gradient that are summed over devices in bfloat16."""
    return [
        f"{shape} of {one.op_name}"
        for one in gradient_sums(parts, text)
        for shape in one.shapes
        if shape.dtype == "bf16"
    ]


@pytest.mark.compilers
@pytest.mark.parametrize(
    "model",
    [dataclasses.replace(EVERYTHING, param_dtype="bfloat16"), RELATIVE],
    ids=["everything", "relative"],
)
def test_every_gradient_is_summed_in_float32_unless_the_config_says_otherwise(model: ModelConfig):
    parts, text = compiled_for_tpu(model, "float32")
    assert sums_in_bfloat16(parts, text) == []
    assert sum(one.operand_bytes for one in gradient_sums(parts, text)) > 0


@pytest.mark.compilers
def test_gradients_of_sharded_parameters_are_summed_in_float32():
    model = dataclasses.replace(EVERYTHING, param_dtype="bfloat16", head=HeadConfig())
    parts = program(model, "float32", MeshConfig(data=2, fsdp=2), tpu_devices("v5p"))
    text = parts.compile_train_step().as_text()
    sums = [
        (shape.dtype, one.kind, shape.bytes)
        for one in collectives(text, parts.mesh)
        if one.kind in ("all-reduce", "reduce-scatter")
        for shape in one.shapes
    ]
    # Scales and biases, of 128 numbers, are joined by sums of a part and zeros.
    assert not [one for one in sums if one[0] == "bf16" and one[2] > 2 * 128]
    # Four experts of 128 × 128, half of the width of each on a device.
    assert ("f32", "reduce-scatter", 4 * 4 * 64 * 128) in sums


@pytest.mark.compilers
def test_gradients_of_matrices_are_summed_in_bfloat16_where_the_config_asks():
    model = dataclasses.replace(EVERYTHING, num_layers=1, first_layers=(), head=HeadConfig())
    parts, text = compiled_for_tpu(model, "bfloat16")
    found = [shape for one in gradient_sums(parts, text) for shape in one.shapes]
    in_float32 = [shape.bytes for shape in found if shape.dtype == "f32"]
    # Scales and biases: the largest are those of a layer's experts.
    assert max(in_float32) <= 4 * 4 * 128
    in_bfloat16 = sum(shape.bytes for shape in found if shape.dtype == "bf16")
    assert in_bfloat16 > 20 * sum(in_float32)


@pytest.mark.compilers
def test_sums_in_bfloat16_that_nobody_asked_for_are_found(monkeypatch):
    """A seeded fault: the product with a rounded kernel, differentiated as it stands."""

    def affine(x: Any, kernel: Any, bias: Any, axes: int, gradient_dtype: str) -> Any:
        return jnp.tensordot(x, kernel.astype(x.dtype), axes)

    monkeypatch.setattr(reference, "affine", affine)
    parts, text = compiled_for_tpu(dataclasses.replace(DENSE, embed_dim=128), "float32")
    assert len(sums_in_bfloat16(parts, text)) >= 7


def gradients(dtype: str, mesh: MeshConfig, **options: int) -> dict[str, np.ndarray]:
    """Those of one step, which SGD's momentum holds after it."""
    parts = program(DENSE, dtype, mesh, jax.devices()[: 1 if mesh.data == 1 else 8], **options)
    state = begin(parts.state, DENSE)
    batch = shard_batch(host_batch(0), parts.batch)
    state, _ = parts.compile_train_step()(state, {}, batch)
    return {
        name: np.array(leaf) for name, leaf in named_leaves(state.opt_state[0][0].trace).items()
    }


def rounded(array: np.ndarray) -> np.ndarray:
    return np.asarray(jnp.asarray(array).astype(jnp.bfloat16).astype(jnp.float32))


def test_gradients_summed_in_bfloat16_are_those_in_float32_rounded():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    exact = gradients("float32", mesh)
    found = gradients("bfloat16", mesh)
    for name, array in exact.items():
        is_scale = name.endswith("scale")
        # Each device rounds its own part, which may be larger than the sum.
        largest = np.abs(array).max()
        np.testing.assert_allclose(found[name], array, atol=2**-7 * largest, err_msg=name)
        assert np.array_equal(found[name], array) == is_scale, name
        assert np.array_equal(rounded(found[name]), found[name]) != is_scale, name


@pytest.mark.thorough
def test_microbatches_are_summed_in_float32():
    found = gradients("bfloat16", MeshConfig(data=1), accumulation=2)
    for name, array in found.items():
        assert not np.array_equal(rounded(array), array), name


def test_activations_in_float32_refuse_gradients_in_bfloat16():
    model = dataclasses.replace(DENSE, dtype="float32")
    with pytest.raises(UserError) as caught:
        program(model, "bfloat16", MeshConfig())
    assert str(caught.value) == (
        "train.reduce_dtype = 'bfloat16' rounds gradients of model.dtype = 'float32'. Use "
        "'float32'."
    )

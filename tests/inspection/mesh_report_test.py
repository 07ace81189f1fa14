"""What `describe` says of a mesh is what arrays on such a mesh are."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from research.core.errors import UserError
from research.core.random import key_for
from research.core.trees import named_leaves
from research.data.objectives import CAUSAL, ObjectiveConfig
from research.inspection.mesh_report import MeshReport, mesh_report, mesh_report_lines
from research.inspection.sharded_arrays import ShardedArray
from research.models.config import ModelConfig
from research.models.language_model import language_model
from research.optim.optimizers import OptimConfig
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig, SlicesConfig
from research.parallel.rules import batch_sharding, param_shardings, partition_spec
from research.scaling.cluster import parse_cluster
from research.training.config import PipelineConfig, TrainConfig
from research.training.language_model import language_model_program
from research.training.partition import TrainableConfig
from tests.models.variants import VARIANTS
from tests.tiny import abstract_params, tiny_config

TRAIN = TrainConfig(steps=1, batch_size=8, sequence_length=16)
CUBE = MeshConfig(data=2, fsdp=2, tensor=2)
OBJECTIVES = {"encoder": "masked", "prefix": "prefix", "encoder_decoder": "span"}


def report_of(model: ModelConfig, mesh: MeshConfig = CUBE, **options: Any) -> MeshReport:
    settings = {
        "train": TRAIN,
        "optim": OptimConfig(),
        "objective": objective_of(model),
        "cluster": parse_cluster("cpu:8"),
    }
    return mesh_report(model=model, mesh=mesh, **(settings | options))


def objective_of(model: ModelConfig) -> ObjectiveConfig:
    if model.structure == "decoder":
        return CAUSAL
    return ObjectiveConfig(kind=OBJECTIVES[model.structure])


def bytes_by_name(report: MeshReport) -> dict[str, int]:
    """Bytes of one layer's arrays on one device, and of others."""
    return {array.name: array.device_bytes for group in report.parameters for array in group.arrays}


def test_bytes_are_those_that_are_counted_by_hand():
    # V 48, D 16, N 4, K 2, H 4, F 24, and 2 layers alike; fsdp and tensor halve, data does not.
    report = report_of(tiny_config())
    attention = {
        "attention/query/kernel": 4 * 8 * 2 * 4,
        "attention/key/kernel": 4 * 8 * 1 * 4,
        "attention/value/kernel": 4 * 8 * 1 * 4,
        "attention/out/kernel": 4 * 2 * 4 * 8,
    }
    mlp = dict.fromkeys(("mlp/up/kernel", "mlp/gate/kernel", "mlp/down/kernel"), 4 * 8 * 12)
    norms = dict.fromkeys(("attention_norm/scale", "mlp_norm/scale"), 4 * 8)
    layer = attention | mlp | norms
    embeddings = {"embed/embedding": 4 * 24 * 8, "unembed": 4 * 24 * 8, "final_norm/scale": 4 * 8}
    assert bytes_by_name(report) == layer | embeddings

    (group,) = [group for group in report.parameters if group.name]
    assert (group.name, group.count, group.stacked) == ("layers 0–1", 2, False)
    assert group.device_bytes_each == sum(layer.values())
    total = 2 * sum(layer.values()) + sum(embeddings.values())
    # Two moments, and the counters of Adam and of the schedule.
    assert report.device.parameters == report.device.gradients == total
    assert report.device.optimizer == 2 * total + 2 * 4
    assert report.device.total == 4 * total + 2 * 4


def test_activations_are_those_that_are_counted_by_hand():
    report = report_of(tiny_config(), train=dataclasses.replace(TRAIN, accumulation=2))
    (group,) = report.activations
    assert (group.name, group.count) == ("layers 0–1", 2)
    # 4 rows of a microbatch of which a device has 1, and 16 tokens.
    hidden = 4 * 16 * 16
    heads = 4 * 16 * 2 * 4
    kv_heads = 4 * 16 * 1 * 4
    mlp = 4 * 16 * 12
    assert {array.name: array.device_bytes for array in group.arrays} == {
        "attention_norm": hidden,
        "attention/query": heads,
        "attention/key": kv_heads,
        "attention/value": kv_heads,
        "attention/out, its input": heads,
        "attention/out": hidden,
        "mlp_norm": hidden,
        "mlp/up": mlp,
        "mlp/gate": mlp,
        "mlp/down, its input": mlp,
        "mlp/down": hidden,
        "output": hidden,
    }
    query = group.arrays[1]
    assert query.axes == ("batch", "length", "heads", "head")
    assert (query.shape, query.device_shape) == ((4, 16, 4, 4), (1, 16, 2, 4))
    assert query.mesh_axes == (("data", "fsdp"), (), ("tensor",), ())


@pytest.mark.parametrize(
    ("mesh", "buffer_factor", "rows"),
    [
        # 8 rows of 16 tokens on 4 shards of the batch: 32 tokens of a device, 2 choices each.
        ({"data": 4, "tensor": 2}, None, 64),
        # Room for all choices of the two devices that have these experts.
        ({"data": 2, "expert": 2, "tensor": 2}, None, 128),
        ({"data": 2, "expert": 2, "tensor": 2}, 1.25, 80),
    ],
)
def test_rows_of_experts_are_those_that_a_device_has_room_for(mesh, buffer_factor, rows):
    experts = dataclasses.replace(VARIANTS["experts"].experts, buffer_factor=buffer_factor)
    report = report_of(tiny_config(experts=experts), MeshConfig(**mesh))
    (group,) = report.activations
    arrays = {array.name: array for array in group.arrays}
    # Its width of 8 is sharded over tensor, that of the model is not.
    assert arrays["mlp/experts/rows"].device_shape == (rows, 16)
    assert arrays["mlp/experts/up"].device_shape == (rows, 4)
    assert arrays["mlp/experts/down"].device_bytes == 4 * rows * 16
    assert arrays["mlp/experts/gate"].shape == (4 * rows, 8)
    assert arrays["mlp/router"].device_bytes == 4 * 32 * 4


HEADS_ALONE = dataclasses.replace(
    TRAIN, trainable=TrainableConfig(select="heads", frozen_dtype="bfloat16")
)
CASES = {
    "dense": (tiny_config(), CUBE, {"optim": OptimConfig(ema_decay=0.9)}),
    "scanned": (
        tiny_config(layer_loop="scan", num_layers=4),
        MeshConfig(data=1, pipeline=2, context=2, tensor=2),
        {"optim": OptimConfig(name="muon")},
    ),
    "experts": (
        VARIANTS["shared experts"],
        MeshConfig(data=2, expert=2, tensor=2),
        {"optim": OptimConfig(name="adafactor")},
    ),
    "encoder-decoder": (VARIANTS["encoder-decoder"], CUBE, {}),
    "ZeRO 1": (tiny_config(), dataclasses.replace(CUBE, zero=1), {}),
    "ZeRO 2": (tiny_config(), dataclasses.replace(CUBE, zero=2), {}),
    "heads alone": (tiny_config(), CUBE, {"train": HEADS_ALONE}),
    "heads alone, ZeRO 2": (
        tiny_config(),
        dataclasses.replace(CUBE, zero=2),
        {"train": HEADS_ALONE},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_those_of_arrays_on_eight_devices(case: str):
    model, mesh, options = CASES[case]
    report = report_of(model, mesh, **options)
    settings = {"train": TRAIN, "optim": OptimConfig()} | options
    program = language_model_program(
        model, settings["optim"], settings["train"], mesh, objective=objective_of(model)
    )

    def placed_bytes(tree: Any) -> int:
        total = 0
        for leaf in jax.tree.leaves(tree):
            array = jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)
            total += array.addressable_shards[0].data.nbytes
        return total

    state = program.state
    device = report.device
    assert device.parameters == placed_bytes(state.params) + placed_bytes(program.frozen)
    # At ZeRO 2 gradients have the shards of a moment, at other levels those of parameters.
    if mesh.zero == 2:
        assert 2 * device.gradients + 2 * 4 == placed_bytes(state.opt_state)
    else:
        assert device.gradients == placed_bytes(state.params)
    assert device.optimizer == placed_bytes(state.opt_state)
    assert device.average == placed_bytes(state.ema)
    assert (device.average > 0) == (case == "dense")
    groups = sum(group.device_bytes for group in report.parameters)
    if "heads alone" not in case:
        assert groups == device.parameters


def test_bytes_are_those_of_a_state_that_a_program_makes():
    model, mesh, options = CASES["experts"]
    state = language_model_program(model, OptimConfig(), TRAIN, mesh).create(key_for(0, "init"))
    shards = {
        name: leaf.addressable_shards[0].data for name, leaf in named_leaves(state.params).items()
    }
    report = report_of(model, mesh, **options)
    # The last layer has experts, and the first is dense.
    dense, mixture = [group for group in report.parameters if group.name]
    for group, prefix in ((dense, "first_layers_0"), (mixture, "layers_0")):
        for array in group.arrays:
            shard = shards[f"{prefix}/{array.name}"]
            assert (array.device_bytes, array.device_shape) == (shard.nbytes, shard.shape)


def test_the_output_of_layers_is_sharded_as_the_report_says():
    model = tiny_config()
    report = report_of(model)
    mesh = make_mesh(CUBE)
    boxed = abstract_params(model)
    params = jax.tree.map(
        lambda box, sharding: jax.ShapeDtypeStruct(box.shape, box.dtype, sharding=sharding),
        jax.tree.map(lambda box: box.value, boxed, is_leaf=lambda leaf: hasattr(leaf, "names")),
        param_shardings(boxed, mesh),
    )
    tokens = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=batch_sharding(mesh))

    def hidden(params: Any, tokens: jax.Array) -> jax.Array:
        inputs = {"tokens": tokens, "positions": jnp.broadcast_to(jnp.arange(16), (8, 16))}
        return language_model(model).hidden(params, inputs).hidden

    with jax.set_mesh(mesh):
        compiled = jax.jit(hidden).lower(params, tokens).compile()
    (group,) = report.activations
    output = group.arrays[-1]
    assert compiled.output_shardings.shard_shape((8, 16, 16)) == output.device_shape


@pytest.mark.fast_cases("sinks", "shared experts", "latent", "encoder-decoder", "post-norm")
@pytest.mark.parametrize("name", VARIANTS)
def test_every_projection_of_every_layer_has_its_activation(name: str):
    model = VARIANTS[name]
    report = report_of(model, MeshConfig(data=8))
    shown = {
        (group.name, array.name): array for group in report.activations for array in group.arrays
    }
    for group in report.parameters:
        for array in group.arrays:
            module, _, leaf = array.name.rpartition("/")
            # The projection of relative distances takes no tokens.
            if not group.name or leaf != "kernel" or module == "attention/relative/projection":
                continue
            assert (group.name, module) in shown, module
            if module.startswith("mlp/experts/"):
                continue
            activation = shown[group.name, module]
            assert activation.axes[:2] == ("batch", "length"), module
            assert array.axes[-1] == activation.axes[-1], module
            check_placed(activation)
    assert {name for name, _ in shown} == {group.name for group in report.parameters if group.name}


def check_placed(array: ShardedArray) -> None:
    mesh = make_mesh(MeshConfig(data=8))
    sharding = NamedSharding(mesh, partition_spec(array.axes))
    placed = jax.device_put(np.zeros(array.shape, array.dtype), sharding)
    assert placed.addressable_shards[0].data.nbytes == array.device_bytes


def test_layers_of_a_kind_are_one_group():
    report = report_of(VARIANTS["first layers"])
    named = [group for group in report.parameters if group.name]
    assert [(group.name, group.count) for group in named] == [("layer 0", 1), ("layers 1–3", 3)]
    # Without a norm before attention the first layer has fewer arrays.
    assert len(named[0].arrays) == len(named[1].arrays) - 1
    scanned = dataclasses.replace(VARIANTS["first layers"], layer_loop="scan")
    named = [group for group in report_of(scanned).parameters if group.name]
    assert [(group.name, group.stacked) for group in named] == [
        ("layer 0", False),
        ("layers 1–3", True),
    ]
    assert report_of(scanned).device == report.device


def test_an_axis_carries_what_arrays_have_on_it():
    mesh = MeshConfig(data=2, pipeline=2, context=2, slices=SlicesConfig(data=2))
    model = tiny_config(num_layers=2, layer_loop="scan")
    data, pipeline, context = report_of(model, mesh, cluster=parse_cluster("cpu:4*2")).axes
    assert data.carries == ("rows of the batch",)
    assert data.networks == ("the network between slices",)
    assert data.collectives == ("all-reduce of gradients",)
    assert (pipeline.carries, pipeline.networks) == (("stages of layers",), ("memory",))
    assert context.carries == ("tokens of a row", "shards of parameters")
    assert context.collectives == (
        "all-gather of parameters",
        "reduce-scatter of gradients",
        "ring of keys and values",
    )


def test_layers_that_do_not_divide_are_said_stage_by_stage():
    model = tiny_config(num_layers=7, layer_loop="scan")
    lines = mesh_report_lines(report_of(model, MeshConfig(pipeline=2)))
    assert "layers of the stages of the model: 4, 3" in lines
    # Of 8 devices, what is left after data are stages.
    open_mesh = MeshConfig(data=4, pipeline=-1)
    assert "layers of the stages of the model: 4, 3" in mesh_report_lines(
        report_of(model, open_mesh)
    )
    # Their state is sharded elsewhere, but the axis has stages all the same.
    assert report_of(model, MeshConfig(pipeline=2)).axes[1].carries == ("stages of layers",)
    # A config that leaves it open has stacked layers there, on CPU too.
    even = dataclasses.replace(model, num_layers=6, layer_loop="auto")
    lines = mesh_report_lines(report_of(even, MeshConfig(pipeline=2)))
    assert any(line.startswith("layers 0–5, stacked") for line in lines)
    assert "layers of the stages of the model: 3 each" in lines


def test_a_schedule_without_stages_is_said():
    train = dataclasses.replace(TRAIN, accumulation=2, pipeline=PipelineConfig("gpipe", 2))
    (note,) = report_of(tiny_config(), train=train).notes
    assert note.startswith("train.pipeline = 'gpipe' with 2 chunk(s) does nothing: mesh.pipeline")
    train = dataclasses.replace(TRAIN, pipeline=PipelineConfig("interleaved", 1))
    with pytest.raises(UserError, match=r"chunks = 1 must be at least 2 with schedule"):
        report_of(tiny_config(), train=train)


@pytest.mark.parametrize(
    ("zero", "carried", "collectives"),
    [
        (1, "optimizer state", ("all-reduce of gradients", "all-gather of new parameters")),
        (
            2,
            "gradients and optimizer state",
            ("reduce-scatter of gradients", "all-gather of new parameters"),
        ),
        (3, "parameters", ("all-gather of parameters", "reduce-scatter of gradients")),
    ],
)
def test_an_axis_of_the_width_carries_what_the_zero_level_shards(zero, carried, collectives):
    report = report_of(tiny_config(), MeshConfig(fsdp=8, zero=zero))
    (fsdp,) = report.axes
    assert fsdp.carries == ("rows of the batch", f"shards of {carried}")
    assert fsdp.collectives == collectives
    embedding = report.parameters[0].arrays[0]
    assert embedding.mesh_axes == ((), ("fsdp",) if zero == 3 else ())
    # One device has all parameters, or an eighth of them.
    parts = 8 if zero == 3 else 1
    assert embedding.device_bytes == 4 * 48 * 16 // parts


def test_an_axis_of_experts_carries_them():
    model, mesh, _ = CASES["experts"]
    _, expert, tensor = report_of(model, mesh).axes
    assert expert.carries == ("rows of the batch", "experts")
    assert "all-to-all of tokens to their experts" in expert.collectives
    assert tensor.carries == ("heads", "KV heads", "MLP width", "vocabulary")
    assert tensor.collectives == ("all-reduce of hidden states",)


@pytest.mark.parametrize(
    ("model", "mesh", "options", "message"),
    [
        ({}, {"tensor": 3}, {}, "mesh.tensor = 3 does not fit 8 devices"),
        ({}, {"tensor": 8}, {}, "mesh.tensor = 8 does not divide kv_heads = 2"),
        ({"vocab_size": 47}, {"tensor": 2}, {}, "mesh.tensor = 2 does not divide vocab = 47"),
        ({}, {"pipeline": 4}, {}, "mesh.pipeline × train.pipeline.chunks = 4 is more than"),
        ({}, {"expert": 2}, {}, "mesh.expert = 2: no layer of the model has experts."),
        (
            {},
            {"pipeline": 2, "context": 2},
            {"train": TrainConfig(1, pipeline=PipelineConfig("zero_bubble"))},
            "mesh.context = 2 must be 1 with train.pipeline.schedule = 'zero_bubble'",
        ),
        (
            {"structure": "encoder_decoder", "encoder_layers": 2},
            {"pipeline": 2},
            {},
            "train.pipeline.schedule = '1f1b' needs one stack of layers",
        ),
        (
            {"experts": dataclasses.replace(VARIANTS["experts"].experts, num_experts=6)},
            {"expert": 4},
            {},
            "mesh.expert = 4 does not divide expert = 6",
        ),
        ({}, {"context": 8}, {"train": TrainConfig(1, sequence_length=12)}, "train.sequence_len"),
        ({}, {}, {"train": TrainConfig(1, batch_size=12)}, "train.batch_size = 12 is not a mul"),
        ({}, {}, {"cluster": parse_cluster("h200:16")}, "mesh.slices = 1 in all, but the dev"),
    ],
)
def test_what_does_not_fit_gets_one_line(model, mesh, options, message: str):
    with pytest.raises(UserError) as raised:
        report_of(tiny_config(**model), MeshConfig(**mesh), **options)
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)


def test_the_lines_have_what_the_report_has():
    model = tiny_config(dtype="bfloat16")
    text = "\n".join(mesh_report_lines(report_of(model, cluster=parse_cluster("h200:8"))))
    assert "layers 0–1, stacked" in text
    assert "layers 2 × embed 16/fsdp × heads 4/tensor × head 4" in text
    assert "batch 8/data·fsdp × length 16 × mlp 24/tensor" in text
    assert " of its 141.0 GB" in text
    on_cpu = "\n".join(mesh_report_lines(report_of(tiny_config())))
    assert "layers 0–1, 2 ×" in on_cpu
    assert " of its " not in on_cpu

"""Where every array lies."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from research.core.errors import UserError
from research.core.trees import named_leaves
from research.models.config import NormConfig, PositionConfig
from research.optim.optimizers import OptimConfig, build_optimizer
from research.parallel.divisibility import check_batch
from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig
from research.parallel.parameter import logical_axes
from research.parallel.process_parts import process_columns, process_rows
from research.parallel.rules import (
    batch_sharding,
    constrain,
    param_shardings,
    partition_spec,
)
from research.parallel.shard_map import whole_batch
from research.training import step
from research.training.state import abstract_state
from research.training.step import shard_batch
from tests.models.variants import VARIANTS
from tests.tiny import abstract_params, tiny_config

FULL = tiny_config(
    attention={"qkv_bias": True, "out_bias": True},
    mlp={"bias": True},
    norm=NormConfig(bias=True),
    position=PositionConfig(kind="learned"),
    layer_loop="scan",
)
# The mesh axes of the width of a parameter, where it is not one of experts.
WIDTH = ("fsdp", "context")
BATCH = ("data", "fsdp", "expert")
SPECS = {
    "embed/embedding": ("tensor", WIDTH),
    "position_embed/embedding": (None, WIDTH),
    "unembed": (WIDTH, "tensor"),
    "final_norm/scale": (WIDTH,),
    "final_norm/bias": (WIDTH,),
    "layers/attention/query/kernel": ("pipeline", WIDTH, "tensor", None),
    "layers/attention/query/bias": ("pipeline", "tensor", None),
    "layers/attention/key/kernel": ("pipeline", WIDTH, "tensor", None),
    "layers/attention/key/bias": ("pipeline", "tensor", None),
    "layers/attention/value/kernel": ("pipeline", WIDTH, "tensor", None),
    "layers/attention/value/bias": ("pipeline", "tensor", None),
    "layers/attention/out/kernel": ("pipeline", "tensor", None, WIDTH),
    "layers/attention/out/bias": ("pipeline", WIDTH),
    "layers/attention_norm/scale": ("pipeline", WIDTH),
    "layers/attention_norm/bias": ("pipeline", WIDTH),
    "layers/mlp/gate/kernel": ("pipeline", WIDTH, "tensor"),
    "layers/mlp/gate/bias": ("pipeline", "tensor"),
    "layers/mlp/up/kernel": ("pipeline", WIDTH, "tensor"),
    "layers/mlp/up/bias": ("pipeline", "tensor"),
    "layers/mlp/down/kernel": ("pipeline", "tensor", WIDTH),
    "layers/mlp/down/bias": ("pipeline", WIDTH),
    "layers/mlp_norm/scale": ("pipeline", WIDTH),
    "layers/mlp_norm/bias": ("pipeline", WIDTH),
}
# Parameters of other models, by variant.
OTHER_SPECS = {
    "shared experts": {
        "layers_0/mlp/router/kernel": (WIDTH, None),
        "layers_0/mlp/selection_bias": (None,),
        "layers_0/mlp/experts/up/kernel": ("expert", ("fsdp", "context"), "tensor"),
        "layers_0/mlp/experts/down/kernel": ("expert", "tensor", ("fsdp", "context")),
        "layers_0/mlp/shared/up/kernel": (WIDTH, "tensor"),
        "layers_0/mlp/shared_gate/kernel": (WIDTH, None),
    },
    "latent": {
        "layers_0/attention/query_down/kernel": (WIDTH, None),
        "layers_0/attention/query_norm/scale": ("fsdp",),
        "layers_0/attention/query/kernel": ("fsdp", "tensor", None),
        "layers_0/attention/latent/kernel": (WIDTH, None),
        "layers_0/attention/turned_key/kernel": (WIDTH, None, None),
        "layers_0/attention/key/kernel": ("fsdp", "tensor", None),
        "layers_0/attention/value/kernel": ("fsdp", "tensor", None),
    },
    "buckets": {"position_bias/embedding": (None, "tensor")},
    "encoder": {"type_embed/embedding": (None, WIDTH), "pooler/classes/kernel": (WIDTH, None)},
}


@pytest.fixture(scope="module")
def mesh() -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(fsdp=2, tensor=2))


def test_every_parameter_lies_as_the_table_says(mesh):
    found = named_leaves(param_shardings(abstract_params(FULL), mesh))
    assert {name: sharding.spec for name, sharding in found.items()} == {
        name: PartitionSpec(*spec) for name, spec in SPECS.items()
    }


@pytest.mark.parametrize("variant", OTHER_SPECS)
def test_parameters_of_experts_latents_and_encoders_lie_as_the_table_says(variant: str, mesh):
    found = named_leaves(param_shardings(abstract_params(VARIANTS[variant]), mesh))
    specs = OTHER_SPECS[variant]
    assert {name: found[name].spec for name in specs} == {
        name: PartitionSpec(*spec) for name, spec in specs.items()
    }


def test_a_low_rank_is_whole_on_every_device():
    assert partition_spec(("embed", "rank")) == PartitionSpec(WIDTH, None)
    assert partition_spec(("layers", "rank", "heads", "head")) == PartitionSpec(
        "pipeline", None, "tensor", None
    )


def test_activations_share_out_the_batch_and_keep_their_width():
    assert partition_spec(("batch", "length", "embed")) == PartitionSpec(BATCH, "context", None)
    assert partition_spec(("batch", "length", "mlp")) == PartitionSpec(BATCH, "context", "tensor")
    assert partition_spec(("batch", "length", "heads", "head")) == PartitionSpec(
        BATCH, "context", "tensor", None
    )
    assert partition_spec((None, "vocab")) == PartitionSpec(None, "tensor")


def test_axis_without_a_rule_is_a_fault():
    with pytest.raises(AssertionError, match="have no rule"):
        partition_spec(("embed", "embedd"))


def test_constraint_acts_under_a_mesh_and_not_without(mesh):
    x = jnp.ones((4, 2, 4))
    assert constrain(x, ("batch", "length", "embed")) is x
    with jax.set_mesh(mesh):
        laid = jax.jit(lambda x: constrain(x, ("batch", "length", "embed")))(x)
    # Of the axes that shard the batch, that of experts has one device.
    assert laid.sharding.spec[0] == ("data", "fsdp")


def test_constraint_of_a_whole_batch_leaves_its_rows_on_all_devices(mesh):
    def laid_out(x):
        return constrain(x, ("batch", None, "heads", None))

    def whole(x):
        with whole_batch():
            return laid_out(x)

    x = jnp.zeros((8, 3, 4, 2))
    with jax.set_mesh(mesh):
        assert jax.jit(laid_out)(x).sharding.spec[0] is not None
        assert jax.jit(whole)(x).sharding.spec == PartitionSpec(None, None, "tensor")


def test_constraint_leaves_out_axes_that_do_not_divide(mesh):
    def spec(shape: tuple[int, ...], names: tuple[str | None, ...]) -> PartitionSpec:
        with jax.set_mesh(mesh):
            return jax.jit(lambda x: constrain(x, names))(jnp.ones(shape)).sharding.spec

    names = ("batch", None, "kv_heads", "head")
    assert spec((4, 3, 2, 4), names) == PartitionSpec(("data", "fsdp"), None, "tensor")
    assert spec((2, 3, 1, 4), names) == PartitionSpec("data")
    assert spec((3, 3, 1, 4), names) == PartitionSpec()


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion", "sgd", "muon"])
def test_moments_lie_as_their_parameters_do(name: str, mesh):
    boxed = abstract_params(FULL)
    optimizer, _ = build_optimizer(OptimConfig(name=name), logical_axes(boxed), 10)
    state = abstract_state(boxed, optimizer, mesh, keep_ema=True)
    params = named_leaves(state.params)
    moments = 0
    for path, leaf in named_leaves((state.opt_state, state.ema)).items():
        owner = next((p for p in params if path.endswith("/" + p)), None)
        if owner is not None and params[owner].shape == leaf.shape:
            moments += 1
            assert leaf.sharding == params[owner].sharding, path
        else:
            assert leaf.sharding.is_fully_replicated, path
            # Counters, Muon's coefficients, and Adafactor's rows and columns.
            assert leaf.size <= 3 or name == "adafactor", path
    copies = {"adamw": 2, "adafactor": 1, "lion": 1, "sgd": 1, "muon": 1}[name] + 1
    assert moments >= copies * len(params)
    for counter in (state.step, state.skipped, state.skipped_in_row):
        assert counter.sharding.is_fully_replicated
        assert counter.dtype == jnp.int32


def test_parameter_that_the_mesh_does_not_divide_is_named():
    boxed = abstract_params(tiny_config())
    with pytest.raises(UserError) as caught:
        param_shardings(boxed, make_mesh(MeshConfig(data=1, tensor=8)))
    assert str(caught.value) == (
        "mesh.tensor = 8 does not divide kv_heads = 2 of layers_0/attention/key/kernel. Use 1 or 2."
    )
    narrow = abstract_params(tiny_config(embed_dim=12))
    with pytest.raises(
        UserError, match=r"mesh.fsdp = 8 does not divide embed = 12 of .*\. Use 1, 2, 3, 4 or 6\."
    ):
        param_shardings(narrow, make_mesh(MeshConfig(data=1, fsdp=8)))


def test_batch_that_cannot_be_shared_out_is_refused(mesh):
    check_batch(8, 6, 2, mesh)
    with pytest.raises(UserError) as caught:
        check_batch(12, 6, 2, mesh)
    message = (
        "train.batch_size = 12 is not a multiple of mesh.data × mesh.fsdp × mesh.expert × "
        "train.accumulation = 8. Use 8."
    )
    assert str(caught.value) == message
    with pytest.raises(UserError, match=r"train.sequence_length = 6 .* mesh.context = 4. Use 4\."):
        check_batch(8, 6, 1, make_mesh(MeshConfig(context=4)))
    with pytest.raises(UserError, match=r"train.batch_size = 2 .* Use 4\."):
        check_batch(2, 6, 1, mesh)


def test_rows_of_a_batch_are_shared_out_over_data_and_fsdp(mesh):
    placed = jax.device_put(np.arange(16).reshape(8, 2), batch_sharding(mesh))
    rows = {shard.index[0].start or 0 for shard in placed.addressable_shards}
    assert rows == {0, 2, 4, 6}
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}


@pytest.mark.parametrize(
    ("sizes", "processes", "parts"),
    [
        ({"data": 8}, 4, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"data": 2, "fsdp": 4}, 2, [(0, 2), (1, 2)]),
        ({"data": 1, "tensor": 8}, 2, [(0, 1), (0, 1)]),
        ({"data": 2, "tensor": 4}, 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ({"data": 4, "tensor": 2}, 8, [(i // 2, 4) for i in range(8)]),
        ({"data": 8}, 1, [(0, 1)]),
    ],
)
def test_process_holds_the_part_of_the_batch_that_its_devices_hold(sizes, processes, parts):
    mesh, each = make_mesh(MeshConfig(**sizes)), 8 // processes
    devices = [mesh.devices.ravel()[i * each : (i + 1) * each].tolist() for i in range(processes)]
    assert [process_rows(batch_sharding(mesh), 16, mine) for mine in devices] == parts


@pytest.mark.parametrize(
    ("sizes", "processes", "parts"),
    [
        ({"data": 2, "context": 4}, 2, [(0, 2, 0, 24), (1, 2, 0, 24)]),
        (
            {"data": 2, "context": 4},
            4,
            [(0, 2, 0, 12), (0, 2, 12, 24), (1, 2, 0, 12), (1, 2, 12, 24)],
        ),
        ({"data": 1, "context": 4, "tensor": 2}, 4, [(0, 1, 6 * i, 6 * i + 6) for i in range(4)]),
        ({"data": 1, "fsdp": 8}, 2, [(0, 2, 0, 24), (1, 2, 0, 24)]),
    ],
)
def test_process_holds_the_part_of_each_row_that_its_devices_hold(sizes, processes, parts):
    mesh, each = make_mesh(MeshConfig(**sizes)), 8 // processes
    devices = [mesh.devices.ravel()[i * each : (i + 1) * each].tolist() for i in range(processes)]
    sharding = batch_sharding(mesh)
    found = [
        (*process_rows(sharding, 16, mine), *process_columns(sharding, 24, mine))
        for mine in devices
    ]
    assert found == parts


def test_tokens_of_a_process_that_do_not_follow_each_other_name_the_size_to_change():
    mesh = make_mesh(MeshConfig(data=1, context=8))
    devices = mesh.devices.ravel()
    with pytest.raises(
        UserError, match=r"^mesh\.context = 8: the tokens of a process do not follow each other"
    ):
        process_columns(batch_sharding(mesh), 24, [devices[0], devices[2]])


def test_a_batch_is_cut_along_its_rows_and_its_length():
    sharding = batch_sharding(make_mesh(MeshConfig(data=2, context=4)))
    tokens = np.arange(4 * 8, dtype=np.int32).reshape(4, 8)
    placed = shard_batch(
        {"tokens": tokens}, {"tokens": jax.ShapeDtypeStruct((4, 8), jnp.int32, sharding=sharding)}
    )
    np.testing.assert_array_equal(placed["tokens"], tokens)
    assert {shard.data.shape for shard in placed["tokens"].addressable_shards} == {(2, 2)}


def test_devices_get_the_columns_of_a_row_that_they_hold(monkeypatch):
    """As in the second of two processes, of which each has half of every row."""
    sharding = batch_sharding(make_mesh(MeshConfig(data=1, context=8)))
    mine = sharding.mesh.devices.ravel()[4:].tolist()
    monkeypatch.setattr(step, "process_columns", functools.partial(process_columns, devices=mine))
    given = []
    monkeypatch.setattr(
        jax, "make_array_from_process_local_data", lambda *arguments: given.append(arguments)
    )
    tokens = np.arange(2 * 24, dtype=np.int32).reshape(2, 24)
    shard_batch(
        {"tokens": tokens}, {"tokens": jax.ShapeDtypeStruct((2, 24), jnp.int32, sharding=sharding)}
    )
    [(_, local, shape)] = given
    np.testing.assert_array_equal(local, [range(12, 24), range(36, 48)])
    assert shape == (2, 24)


def test_rows_that_are_no_part_of_the_batch_name_the_size_to_change():
    mesh = make_mesh(MeshConfig(data=3, tensor=2), jax.devices()[:6])
    said = r"^mesh\.tensor = 2: .* Use a divisor or a multiple of the 3 devices of a process\.$"
    with pytest.raises(UserError, match=said):
        process_rows(batch_sharding(mesh), 12, mesh.devices.ravel()[:3].tolist())
    devices = make_mesh(MeshConfig(data=8)).devices.ravel()
    with pytest.raises(UserError, match=r"no even part"):  # a gap between the rows
        process_rows(batch_sharding(make_mesh(MeshConfig(data=8))), 8, [devices[0], devices[2]])

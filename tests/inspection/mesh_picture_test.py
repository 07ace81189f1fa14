"""The picture of a mesh."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from research.inspection.mesh_picture import WIDTH, MeshAxis, mesh_axes, picture
from research.inspection.sharded_arrays import sharded_array
from research.kernels.attention import KeyExchange
from research.parallel.mesh import abstract_mesh
from research.parallel.mesh_axes import MESH_AXES
from research.parallel.mesh_config import MeshConfig, SlicesConfig
from research.scaling.cluster import parse_cluster

WEIGHTS = ("layers", "expert", "embed", "mlp")
TOKENS = ("batch", "length", "heads", "head")
RING = KeyExchange()


def axes_of(name: str, exchange: KeyExchange = RING, **sizes) -> list[MeshAxis]:
    cluster = parse_cluster(name)
    config = MeshConfig(**sizes)
    mesh = abstract_mesh(config, cluster.num_devices, cluster.slices)
    arrays = []
    for axes in (WEIGHTS, TOKENS):
        arrays.append(sharded_array("array", axes, (mesh.size,) * 4, "float32", mesh))
    return mesh_axes(mesh, config, cluster, arrays, exchange)


def test_a_mesh_is_drawn_axis_by_axis():
    axes = axes_of("v5p:2x2x4*2", data=4, tensor=8, slices=SlicesConfig(data=2))
    lines = picture(axes, parse_cluster("v5p:2x2x4*2"), "one device")
    assert lines == [
        "32 devices, v5p:2x2x4*2: 2 slices of 16",
        "data 4    ┌─────╥─────┐          rows of the batch",
        "          │ 0–1 ║ 2–3 │          all-reduce of gradients",
        "          └─┬───╨─────┘          over ICI and the data-center network",
        "tensor 8  ┌─┴─┬───┬───┬───┬───┐  heads, MLP width",
        "          │ 0 │ 1 │ 2 │ … │ 7 │  all-reduce of hidden states",
        "          └─┬─┴───┴───┴───┴───┘  over ICI",
        "          one device",
    ]


@pytest.mark.parametrize(
    ("name", "slices", "networks"),
    [
        ("v5p:2x2x2", {}, ("ICI",)),
        ("v5p:2x2x2*2", {"data": 2}, ("ICI", "the data-center network")),
        ("v5p:2x2x1*8", {"data": 8}, ("the data-center network",)),
        ("h200:8", {}, ("NVLink",)),
        ("h200:16", {"data": 2}, ("NVLink", "the network between nodes")),
        ("cpu:8", {}, ("memory",)),
    ],
)
def test_an_axis_names_its_networks(name, slices, networks):
    size = max(8, slices.get("data", 1))
    rest = parse_cluster(name).num_devices // size
    axes = axes_of(name, data=size, tensor=rest, slices=SlicesConfig(**slices))
    assert axes[0].networks == networks
    # Other axes stay inside a slice.
    assert all(axis.networks == (parse_cluster(name).fast_network,) for axis in axes[1:])


def test_a_double_line_is_between_slices_alone():
    inside = axes_of("h200:16", data=2, fsdp=8, slices=SlicesConfig(data=2))
    lines = picture(inside, parse_cluster("h200:16"), "")
    assert ["║" in line for line in lines] == [
        False,
        False,
        True,
        False,
        False,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize(
    ("exchange", "collectives"),
    [
        (KeyExchange(), ("ring of keys and values",)),
        (KeyExchange(kind="all_gather"), ("all-gather of keys and values",)),
        (KeyExchange(all_to_all=4), ("all-to-all of heads",)),
        (KeyExchange(all_to_all=2), ("all-to-all of heads", "ring of keys and values")),
    ],
)
def test_the_axis_of_the_context_exchanges_keys_as_the_config_says(exchange, collectives):
    data, context = axes_of("cpu:8", exchange, context=4)
    assert context.collectives[2:] == collectives
    assert not set(collectives) & set(data.collectives)


@settings(deadline=None, max_examples=40)
@given(
    within=st.lists(st.sampled_from((1, 1, 2, 3, 128)), min_size=6, max_size=6),
    across=st.lists(st.sampled_from((1, 1, 2, 8)), min_size=6, max_size=6),
)
def test_no_picture_is_wider_than_a_page(within, across):
    assume(math.prod(within) * math.prod(across) < 2**30)
    sizes = {
        name: inside * slices
        for name, inside, slices in zip(MESH_AXES, within, across, strict=True)
    }
    name = f"cpu:{math.prod(within)}*{math.prod(across)}"
    slices = SlicesConfig(**dict(zip(MESH_AXES, across, strict=True)))
    axes = axes_of(name, **sizes, slices=slices)
    lines = picture(axes, parse_cluster(name), "one device")
    assert max(map(len, lines)) <= WIDTH
    assert [axis.name for axis in axes] == [name for name, size in sizes.items() if size > 1]
    for axis in axes:
        assert any(line.startswith(f"{axis.name} {axis.size} ") for line in lines)
        assert axis.collectives

"""The collectives of programs that the CPU's and the TPU's compiler made, and what they move."""

import jax
import pytest
from jax.sharding import AbstractMesh, Mesh

from research.parallel.mesh import make_mesh
from research.parallel.mesh_config import MeshConfig, SlicesConfig, resolve_sizes
from research.scaling.collectives import (
    Collective,
    collectives,
    exposed_share,
    volume_by_axis,
)
from research.scaling.topology import tpu_devices
from tests.scaling.make_programs import EXCHANGES, LAYERS, LAYERS_OF_16, PROGRAMS, exchanges, layers

MB = 2**20


def abstract(sizes: MeshConfig, devices: int) -> AbstractMesh:
    resolved = resolve_sizes(sizes, devices)
    return AbstractMesh(tuple(resolved.values()), tuple(resolved))


def recorded(name: str, slices: SlicesConfig | None = None) -> list[Collective]:
    sizes = EXCHANGES if name.startswith("exchanges") else LAYERS
    mesh = abstract(sizes, 8)
    if name == "layers_tpu7x":
        mesh = abstract(LAYERS_OF_16, 16)
    return list(collectives((PROGRAMS / f"{name}.hlo").read_text(), mesh, slices))


def rows(found: list[Collective]) -> list[tuple]:
    return [
        (each.kind, each.axes, each.operand_bytes, each.result_bytes, each.times, each.trips_known)
        for each in found
    ]


# Arrays of 4 × 8 float32; the loop has three turns, and of its branches the one with the permute
# moves most.
EXCHANGED = [
    ("all-to-all", ("tensor",), 128, 128, 0, True),
    ("collective-permute", ("context",), 128, 128, 3, True),
    ("reduce-scatter", ("data",), 128, 64, 1, True),
    ("all-gather", ("data", "context"), 64, 256, 1, True),
    ("all-reduce", ("context",), 256, 256, 1, False),
]


def test_collectives_of_a_cpu_program():
    found = recorded("exchanges_cpu")
    assert rows(found) == EXCHANGED
    assert {each.dtype for each in found} == {"f32"}
    assert not any(each.is_async for each in found)
    assert found[3].op_name.endswith("all_gather")


def test_collectives_of_a_tpu_program():
    found = recorded("exchanges_v5p")
    # So small an array is summed whole, and each device takes its part.
    summed = ("all-reduce", ("data",), 128, 128, 1, True)
    assert rows(found) == [*EXCHANGED[:2], summed, *EXCHANGED[3:]]
    assert [each.is_async for each in found] == [False, True, False, False, False]


def test_collectives_that_a_tpu_spreads_over_fusions_are_counted_once():
    found = recorded("layers_v5p")
    gathers = [each for each in found if each.kind == "all-gather"]
    # Two matrices of 4,096 × 16,384 bfloat16, cut by tensor 2, forward and backward, in 4 layers
    assert rows(gathers) == [("all-gather", ("fsdp",), 32 * MB, 64 * MB, 4, True)] * 4
    assert [each.is_async for each in gathers] == [False, True, True, True]


def test_reduce_scatter_that_a_tpu_makes_of_an_all_reduce_is_one():
    scatters = [each for each in recorded("layers_v5p") if each.kind == "reduce-scatter"]
    assert [each.axes for each in scatters] == [("fsdp",)] * 2
    assert [each.times for each in scatters] == [4, 4]
    # The second one's rows are padded from 4,096 to 4,176.
    assert [each.operand_bytes for each in scatters] == [64 * MB, 4176 * 8192 * 2]
    assert all("dot_general" in each.op_name for each in scatters)


def test_permute_that_aligns_a_padded_scatter_is_known_as_one():
    permutes = [each for each in recorded("layers_v5p") if each.kind == "collective-permute"]
    assert [(each.operand_bytes, each.aligns_scatter) for each in permutes] == [
        (40 * 8192 * 2, True)
    ]
    permutes = [each for each in recorded("exchanges_v5p") if each.kind == "collective-permute"]
    assert [each.aligns_scatter for each in permutes] == [False]


def test_collectives_of_sparse_cores_are_asynchronous():
    found = recorded("layers_tpu7x")
    assert {each.is_async for each in found} == {True}
    assert {(each.kind, each.axes, each.times) for each in found} == {
        ("all-gather", ("fsdp",), 4),
        ("all-reduce", ("tensor",), 4),
        ("all-reduce", ("data", "fsdp"), 4),
    }


def test_bytes_on_the_wire_are_those_of_a_ring():
    found = {each.kind: each.wire_bytes for each in recorded("exchanges_cpu")}
    assert found == {
        "all-to-all": 128 / 2,
        "collective-permute": 128,
        "reduce-scatter": 128 / 2,
        "all-gather": 256 * 3 / 4,
        "all-reduce": 2 * 256 / 2,
    }


def test_volume_is_summed_over_runs_by_axis():
    assert volume_by_axis(recorded("exchanges_cpu")) == {
        ("tensor",): 0,
        ("context",): 3 * 128 + 256,
        ("data",): 64,
        ("data", "context"): 192,
    }
    volumes = volume_by_axis(recorded("layers_tpu7x"))
    # Activations [4, 1024, 4096] of a device, summed over 4, forward and backward, in 4 layers
    assert volumes["tensor",] == 2 * 4 * 2 * 32 * MB * 3 / 4


def test_slow_network_is_crossed_along_the_axis_that_the_slices_lie_along():
    found = recorded("layers_v5p", SlicesConfig(data=2))
    assert {each.axes for each in found if each.crosses_slices} == {("data",)}
    found = recorded("layers_v5p", SlicesConfig(tensor=2))
    assert {each.axes for each in found if each.crosses_slices} == {("tensor",)}
    assert not any(each.crosses_slices for each in recorded("layers_v5p"))


def test_collective_is_exposed_where_nothing_is_computed_up_to_its_end():
    found = recorded("layers_v5p")
    meanwhile = {each.instruction: each.meanwhile for each in found}
    overlapped = [each for each in found if each.meanwhile]
    # Three of the four gathers run beside a matmul, as does a small permute; what is summed waits.
    assert [each.kind for each in overlapped] == ["all-gather"] * 3 + ["collective-permute"]
    assert meanwhile[overlapped[0].instruction] == ("fusion.66",)
    hidden = 3 * 4 * 32 * MB + 4 * 40 * 8192 * 2
    total = sum(each.volume for each in found)
    assert exposed_share(found) == pytest.approx(1 - hidden / total)


def test_start_that_is_done_at_once_hides_nothing():
    found = recorded("exchanges_v5p")
    assert [each.is_async for each in found].count(True) == 1
    assert exposed_share(found) == 1


def test_arrays_that_are_only_moved_hide_no_exchange():
    found = recorded("layers_tpu7x")
    # Between the first gather and its end a slice of a matrix is copied, and nothing else.
    assert [bool(each.meanwhile) for each in found] == [False, *[True] * 6]
    matrix = 4 * 32 * MB / 2
    assert exposed_share(found) == matrix / sum(each.volume for each in found)


def test_no_collective_exposes_nothing():
    assert exposed_share([]) == 0


def compiled(traced: jax.stages.Traced, mesh: Mesh, platform: str) -> list[Collective]:
    program = traced.lower(lowering_platforms=(platform,)).compile()
    return list(collectives(program.as_text(), mesh))


def test_recording_is_what_this_machine_compiles():
    mesh = make_mesh(EXCHANGES)
    with jax.set_mesh(mesh):
        assert rows(compiled(exchanges(mesh), mesh, "cpu")) == EXCHANGED


@pytest.mark.compilers
@pytest.mark.filterwarnings("ignore:Error reading persistent compilation cache entry")
def test_layers_gather_and_scatter_over_fsdp_on_a_tpu():
    pytest.importorskip("libtpu", reason="compiling for a TPU needs jax[tpu]")
    mesh = make_mesh(LAYERS, tpu_devices("v5p:2x2x2"))
    with jax.set_mesh(mesh):
        found = compiled(layers(mesh), mesh, "tpu")
    volumes = volume_by_axis(found)
    # Two matrices of 64 MB in each of four layers are gathered twice, and their gradients scattered
    # over fsdp 2 and summed over data 2; what the compiler pads is below 2 %.
    matrices = 4 * 2 * 64 * MB
    assert volumes["fsdp",] == pytest.approx(3 * matrices / 2, rel=0.02)
    assert volumes["data",] == matrices / 2
    assert volumes["tensor",] == 4 * 2 * 32 * MB
    assert all(each.trips_known for each in found)

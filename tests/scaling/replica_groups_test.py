"""The devices of a collective in all of XLA's spellings, and where they lie on the mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from research.parallel.mesh import make_mesh
from research.parallel.mesh_axes import MESH_AXES
from research.parallel.mesh_config import MeshConfig, SlicesConfig
from research.scaling.replica_groups import (
    axes_between,
    crosses_slices,
    parse_groups,
    slice_of_each,
)

FSDP = [[0, 2], [1, 3], [4, 6], [5, 7]]


def mesh(**sizes: int) -> Mesh:
    return make_mesh(MeshConfig(data=sizes.pop("data", 1), **sizes))


def as_sets(groups: np.ndarray) -> list[list[int]]:
    return sorted(sorted(group) for group in groups.tolist())


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"replica_groups": "{{0,2},{4,6},{1,3},{5,7}}"}, FSDP),
        ({"replica_groups": "[4,2]<=[2,2,2]T(0,2,1)"}, FSDP),
        ({"replica_groups": "[4,2]<=[4,2]T(1,0)"}, FSDP),
        ({"replica_groups": "[2,4]<=[8]"}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"replica_groups": "{}"}, [list(range(8))]),
        (
            {
                "replica_groups": "mesh['axis_0'=2,'axis_1'=4]",
                "device_ids": "([2,2,2]T(1,0,2)) {'axis_0'}",
            },
            FSDP,
        ),
        (
            {
                "replica_groups": "mesh['axis_0'=2,'axis_1'=4]",
                "device_ids": "(0,1,4,5,2,3,6,7) {'axis_0'}",
            },
            FSDP,
        ),
        (
            {"replica_groups": "mesh['axis_0'=4,'axis_1'=2] {'axis_1'}"},
            [[0, 1], [2, 3], [4, 5], [6, 7]],
        ),
        (
            {"replica_groups": "mesh['axis_0'=2,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}"},
            [[0, 1, 4, 5], [2, 3, 6, 7]],
        ),
        ({"replica_groups": "mesh['axis_0'=8] {'axis_0':(2)2}"}, FSDP),
        ({"source_target_pairs": "{{0,2},{1,3},{4,6},{5,7}}"}, FSDP),
    ],
    ids=lambda value: str(value)[:60],
)
def test_groups_in_every_spelling(attributes: dict[str, str], expected: list[list[int]]):
    assert as_sets(parse_groups(attributes, 8)) == expected


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (FSDP, ("fsdp",)),
        ([[0, 1], [2, 3], [4, 5], [6, 7]], ("tensor",)),
        ([[0, 4, 2, 6], [1, 5, 3, 7]], ("data", "fsdp")),
        ([list(range(8))], ("data", "fsdp", "tensor")),
        ([[each] for each in range(8)], ()),
        # One pair that lies along two axes is enough.
        ([[0, 2], [1, 5]], ("data", "fsdp")),
    ],
    ids=str,
)
def test_axes_are_those_along_which_devices_lie_apart(
    groups: list[list[int]], expected: tuple[str, ...]
):
    assert axes_between(np.array(groups), mesh(data=2, fsdp=2, tensor=2)) == expected


def test_part_of_an_axis_is_that_axis():
    assert axes_between(np.array([[0, 1], [2, 3]]), mesh(context=4, tensor=2)) == ("tensor",)
    assert axes_between(np.array([[0, 4], [1, 5]]), mesh(context=4, tensor=2)) == ("context",)


def test_group_crosses_slices_where_its_devices_are_in_several():
    # data 4 over 2 slices: devices 0 to 3 and 4 to 7.
    slices = SlicesConfig(data=2)
    index = slice_of_each(mesh(data=4, tensor=2), slices)
    assert index.tolist() == [0] * 4 + [1] * 4
    assert not crosses_slices(np.array([[0, 1], [2, 3]]), index)
    assert not crosses_slices(np.array([[0, 2], [4, 6]]), index)
    assert crosses_slices(np.array([[2, 4], [0, 6]]), index)
    # One slice has no other.
    one = slice_of_each(mesh(data=4, tensor=2), SlicesConfig())
    assert not crosses_slices(np.array([[2, 4], [0, 6]]), one)


@pytest.mark.parametrize("sizes", [{"data": 2}, {"tensor": 2}, {"data": 2, "tensor": 2}], ids=str)
def test_devices_are_in_the_slices_that_the_mesh_puts_them_in(sizes: dict[str, int]):
    config = MeshConfig(data=4, tensor=2, slices=SlicesConfig(**sizes))
    real = make_mesh(config)
    assert np.array_equal(
        slice_of_each(real, config.slices), slice_of_each(real.abstract_mesh, config.slices)
    )


def test_slices_are_where_the_devices_are_whatever_the_mesh_makes_of_them():
    # The mesh takes them in another order: devices 0 and 4 are neighbours along tensor.
    devices = np.array(jax.devices()).reshape(2, 4).T.reshape(4, 1, 1, 1, 1, 2)
    index = slice_of_each(Mesh(devices, MESH_AXES), SlicesConfig(data=2))
    assert index.tolist() == [0, 1] * 4

"""A mesh that does not fit says which size to change."""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.parallel.distributed import DistributedConfig
from research.parallel.mesh import abstract_mesh, make_mesh
from research.parallel.mesh_axes import MESH_AXES
from research.parallel.mesh_config import MeshConfig, SlicesConfig, resolve_sizes
from research.parallel.slices import split_slices


def sizes(devices: int, **fields: int) -> tuple[int, ...]:
    found = resolve_sizes(MeshConfig(**fields), devices)
    return found["data"], found["fsdp"], found["tensor"]


def test_free_size_takes_what_is_left():
    assert sizes(8) == (8, 1, 1)
    assert sizes(8, fsdp=2, tensor=2) == (2, 2, 2)
    assert sizes(8, data=1, fsdp=-1) == (1, 8, 1)
    assert sizes(8, data=2, fsdp=2, tensor=-1) == (2, 2, 2)
    assert sizes(1, data=1) == (1, 1, 1)


@pytest.mark.parametrize(
    ("devices", "fields", "message"),
    [
        (
            8,
            {"tensor": 3},
            "mesh.tensor = 3 does not fit 8 devices (data -1 × tensor 3). Set mesh.tensor = 2 "
            "or 4.",
        ),
        (
            8,
            {"tensor": 16},
            "mesh.tensor = 16 does not fit 8 devices (data -1 × tensor 16). Set mesh.tensor = 8.",
        ),
        (
            8,
            {"data": 4, "tensor": 4},
            "mesh.data = 4 does not fit 8 devices (data 4 × tensor 4). Set mesh.data = 2.",
        ),
        (
            8,
            {"data": 1, "fsdp": 16},
            "mesh.fsdp = 16 does not fit 8 devices (fsdp 16). Set mesh.fsdp = 8.",
        ),
        (8, {"data": 2}, "mesh.data = 2 does not fit 8 devices (data 2). Set mesh.data = 8."),
        (8, {"data": 1}, "mesh.data = 1 does not fit 8 devices (all sizes 1). Set mesh.data = 8."),
        (6, {"data": 4, "fsdp": 4}, "mesh does not fit 6 devices (data 4 × fsdp 4)."),
    ],
)
def test_sizes_that_do_not_fit_are_named_with_the_one_to_change(
    devices: int, fields: dict[str, int], message: str
):
    with pytest.raises(UserError) as caught:
        sizes(devices, **fields)
    assert str(caught.value).startswith(message)


@settings(deadline=None, max_examples=100)
@given(
    devices=st.sampled_from([1, 2, 4, 6, 8, 16]),
    data=st.sampled_from([-1, 1, 2, 3, 4]),
    fsdp=st.sampled_from([1, 2, 3, 8]),
    tensor=st.sampled_from([1, 2, 4]),
)
def test_advice_is_followed_by_a_mesh_that_fits(devices: int, data: int, fsdp: int, tensor: int):
    config = {"data": data, "fsdp": fsdp, "tensor": tensor}
    try:
        found = resolve_sizes(MeshConfig(**config), devices)
    except UserError as error:
        name, _, value = str(error).partition("Set mesh.")[2].rstrip(".").partition(" = ")
        if not value[0].isdigit():
            # No size alone can mend it.
            assert value.startswith("-1 and let the others divide them")
            assert all(
                devices % (abs(data) * fsdp * tensor // config[axis]) for axis in ("fsdp", "tensor")
            )
            return
        # "2 or 4": both fit.
        for size in map(int, value.split(" or ")):
            found = resolve_sizes(MeshConfig(**{**config, name: size}), devices)
            assert found["data"] * found["fsdp"] * found["tensor"] == devices
        return
    assert found["data"] * found["fsdp"] * found["tensor"] == devices


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor": 0}, "tensor = 0 must be at least 1, or -1"),
        ({"fsdp": -2}, "fsdp = -2 must be at least 1, or -1"),
        ({"tensor": -1}, "tensor = -1: only one size may be -1, and data is"),
        ({"context": 0}, "context = 0 must be at least 1, or -1"),
    ],
)
def test_impossible_size_is_refused(fields: dict[str, int], message: str):
    with pytest.raises(UserError) as caught:
        MeshConfig(**fields)
    assert str(caught.value).startswith(message)


def test_each_slice_has_its_part_of_an_axis():
    mesh = make_mesh(MeshConfig(data=4, tensor=2, slices=SlicesConfig(data=2)))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    # Replicas 0 and 1 are in the first slice, the devices 0 to 3.
    np.testing.assert_array_equal(ids.reshape(4, 2), [[0, 1], [2, 3], [4, 5], [6, 7]])
    mesh = make_mesh(MeshConfig(data=2, tensor=4, slices=SlicesConfig(tensor=2)))
    ids = np.vectorize(lambda device: device.id)(mesh.devices)
    np.testing.assert_array_equal(ids.reshape(2, 4), [[0, 1, 4, 5], [2, 3, 6, 7]])


def test_slices_of_tpus_are_those_that_the_devices_name():
    class Device(NamedTuple):
        id: int
        slice_index: int

    devices = [Device(index, index % 2) for index in range(4)]
    found = split_slices(SlicesConfig(fsdp=2), devices)
    assert [[device.id for device in part] for part in found] == [[0, 2], [1, 3]]
    with pytest.raises(UserError, match=r"mesh.slices = 1 in all, but the devices are in 2 slices"):
        split_slices(SlicesConfig(), devices)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"slices": SlicesConfig(data=3)},
            "mesh.slices = 3 in all do not divide 8 devices. Use 2 or 4.",
        ),
        (
            {"data": 1, "fsdp": 8, "slices": SlicesConfig(data=2)},
            "mesh.slices.data = 2 does not divide mesh.data = 1. Use 1.",
        ),
    ],
)
def test_slices_that_do_not_fit_are_refused(fields: dict[str, Any], message: str):
    with pytest.raises(UserError) as caught:
        make_mesh(MeshConfig(**fields))
    assert str(caught.value) == message


def test_a_mesh_of_devices_that_are_not_here_has_the_sizes_of_a_real_one():
    config = MeshConfig(tensor=2, slices=SlicesConfig(data=2))
    mesh = abstract_mesh(config, 8, 2)
    assert mesh.shape == make_mesh(config).shape
    assert mesh.axis_names == MESH_AXES


@pytest.mark.parametrize(
    ("fields", "num_slices", "message"),
    [
        ({"data": 1, "fsdp": 3}, 1, "mesh.fsdp = 3 does not fit 8 devices"),
        ({}, 2, "mesh.slices = 1 in all, but the devices are in 2 slices. Use mesh.slices.data"),
        ({"slices": SlicesConfig(data=2)}, 4, "mesh.slices = 2 in all, but the devices are in 4"),
        (
            {"slices": SlicesConfig(data=3)},
            1,
            "mesh.slices = 3 in all do not divide 8 devices. Use 2 or 4.",
        ),
        (
            {"tensor": 8, "slices": SlicesConfig(data=2)},
            2,
            "mesh.slices.data = 2 does not divide mesh.data = 1. Use 1.",
        ),
    ],
)
def test_sizes_that_do_not_fit_devices_that_are_not_here_are_refused(fields, num_slices, message):
    with pytest.raises(UserError) as caught:
        abstract_mesh(MeshConfig(**fields), 8, num_slices)
    assert str(caught.value).startswith(message)


def test_mesh_has_every_axis_and_each_device_once():
    mesh = make_mesh(MeshConfig(fsdp=2, tensor=2))
    assert mesh.axis_names == MESH_AXES
    assert dict(mesh.shape) == {
        "data": 2,
        "fsdp": 2,
        "pipeline": 1,
        "context": 1,
        "expert": 1,
        "tensor": 2,
    }
    assert sorted(device.id for device in mesh.devices.flat) == [
        device.id for device in jax.devices()
    ]
    assert make_mesh(MeshConfig(), jax.devices()[:3]).shape["data"] == 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_processes": 2}, "coordinator, num_processes and process_id must be given together"),
        (
            {"coordinator": "a:1", "num_processes": 2, "process_id": 2},
            "process_id = 2 must lie below num_processes = 2",
        ),
    ],
)
def test_processes_that_cannot_meet_are_refused(fields, message: str):
    with pytest.raises(UserError, match=message):
        DistributedConfig(**fields)

"""Which devices a collective joins, as XLA writes it, and the mesh axes that they lie along.

A device's number is its index in `mesh.devices.flat`.
"""

import math
from collections.abc import Mapping

import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jaxtyping import Int

from research.parallel.mesh_config import SlicesConfig
from research.parallel.slices import split_slices
from research.scaling.hlo import split

AnyMesh = Mesh | AbstractMesh
Groups = Int[np.ndarray, "groups members"]


def parse_groups(attributes: Mapping[str, str], num_devices: int) -> Groups:
    """Returns the devices of each group; those of a permute are pairs of a source and a target.

    Args:
      attributes: of a collective, from `Instruction.attributes`.
      num_devices: of the mesh, all of which are one group where the program names none.
    """
    if "source_target_pairs" in attributes:
        pairs = attributes["source_target_pairs"]
        return _listed(pairs)
    text = attributes["replica_groups"]
    if text == "{}":
        devices = np.arange(num_devices)
        return devices[None]
    if text.startswith("{"):
        return _listed(text)
    if text.startswith("mesh"):
        return _of_mesh(text, attributes)
    # `[4,2]<=[2,2,2]T(2,1,0)`: numbers 0 to 7 in order, as [2, 2, 2], transposed, as [4, 2]
    shape_text, _, source = text.partition("<=")
    devices = _iota(source)
    shape = _numbers(shape_text)
    return devices.reshape(shape)


def _listed(text: str) -> Groups:
    # `{{0,1},{2,3}}` -> `{0,1}`, `{2,3}` -> [[0, 1], [2, 3]]
    group_texts = split(text[1:-1])
    groups = [_numbers(group_text) for group_text in group_texts]
    return np.array(groups)


def _of_mesh(text: str, attributes: Mapping[str, str]) -> Groups:
    """Returns the groups along some axes of XLA's own mesh.

    `mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}`: devices 0, 1, 4, 5, 2, 3, 6 and 7 as
    [2, 4], and the groups along the first axis.
    """
    mesh_text, _, joined_text = text.partition(" ")
    device_text = attributes.get("device_ids", "")
    if device_text:
        device_text, _, joined_text = device_text.partition(" ")

    # `mesh['a'=2,'b'=4]` -> {'a': 2, 'b': 4}
    sizes = {}
    axes_text = mesh_text.removeprefix("mesh[").removesuffix("]")
    for axis in split(axes_text):
        name, _, size_text = axis.partition("=")
        name = name.strip()
        sizes[name] = int(size_text)

    if device_text:
        devices = _iota(device_text[1:-1])
        devices = devices.reshape(-1)
    else:
        num_devices = math.prod(sizes.values())
        devices = np.arange(num_devices)

    # `{'a','b':(2)2}` -> the parts of `a` and `b` that the groups take
    parts = {}
    joined_text = joined_text.strip()
    for part in split(joined_text[1:-1]):
        name, before_and_width = _joined_axis(part)
        parts[name] = before_and_width

    # An axis of 8 of which the groups take a part, `'a':(2)2`, is three: 2 × 2 × 2.
    shape = []
    joined = []
    for name, size in sizes.items():
        before, width = parts.get(name, (1, 1))
        if name in parts and width == 0:
            width = size
        after = size // (before * width)
        joined.append(len(shape) + 1)
        shape += [before, width, after]

    # [2, 4] joined along the first: [4, 2], one row a group.
    members = math.prod(shape[axis] for axis in joined)
    last_axes = range(-len(joined), 0)
    devices = devices.reshape(shape)
    devices = np.moveaxis(devices, joined, last_axes)
    return devices.reshape(-1, members)


def _joined_axis(text: str) -> tuple[str, tuple[int, int]]:
    """Returns the name of an axis, the size of its part before the joined one, and the size of
    that; 0 is all of it.
    """
    # `'a'` -> 1 and 0, `'a':(2)4` -> 2 and 4
    name, _, part = text.strip().partition(":")
    if not part:
        return name, (1, 0)
    part = part.removeprefix("(")
    before_text, _, width_text = part.partition(")")
    before = int(before_text)
    width = int(width_text)
    return name, (before, width)


def _iota(text: str) -> Int[np.ndarray, "..."]:
    """Returns device numbers in the order that `[4,2]T(1,0)` says, or the ones that `0,2,1,3`
    lists.
    """
    if not text.startswith("["):
        return np.array(_numbers(text))
    shape_text, _, permutation = text.partition("T")
    shape = _numbers(shape_text)
    num_devices = math.prod(shape)
    devices = np.arange(num_devices)
    devices = devices.reshape(shape)
    if permutation:
        axes = _numbers(permutation)
        devices = devices.transpose(axes)
    return devices


def _numbers(text: str) -> list[int]:
    # `{0,1}`, `[4,2]`, `(1,0)` and `0,2` are lists of numbers.
    text = text.strip()
    text = text.strip("{}[]()")
    return [int(number) for number in text.split(",") if number]


def axes_between(groups: Groups, mesh: AnyMesh) -> tuple[str, ...]:
    """Returns the mesh axes along which devices of a group lie apart; a group may be a part of
    them.
    """
    # Devices 0 and 2 of data 2 × fsdp 2 × tensor 2 are (0, 0, 0) and (0, 1, 0): fsdp.
    sizes = tuple(mesh.shape.values())
    coordinates = np.unravel_index(groups, sizes)

    # Of each axis: [groups, members], members compared with the first one of their group
    names = []
    for name, index in zip(mesh.shape, coordinates, strict=True):
        first_index = index[:, :1]
        if (index != first_index).any():
            names.append(name)
    return tuple(names)


def slice_of_each(mesh: AnyMesh, slices: SlicesConfig) -> Int[np.ndarray, " devices"]:
    """Returns the slice that each device of a mesh is in, in the order of `mesh.devices.flat`.

    It is where the devices are, whatever the mesh makes of them; those of an abstract mesh are
    where `make_mesh` puts them.
    """
    if isinstance(mesh, AbstractMesh):
        # data 4 over 2 slices: coordinates 0 and 1 are in slice 0, 2 and 3 in slice 1.
        slices_along = slices.sizes()
        coordinates = np.indices(tuple(mesh.shape.values()))
        slice_coordinates = []
        for axis, (name, size) in enumerate(mesh.shape.items()):
            within = size // slices_along[name]
            slice_coordinate = coordinates[axis] // within
            slice_coordinates.append(slice_coordinate.ravel())
        slice_shape = tuple(slices_along.values())
        return np.ravel_multi_index(tuple(slice_coordinates), slice_shape)

    devices = sorted(mesh.devices.flat, key=lambda device: device.id)
    index_of = {}
    for index, members in enumerate(split_slices(slices, devices)):
        for device in members:
            index_of[device.id] = index
    indices = [index_of[device.id] for device in mesh.devices.flat]
    return np.array(indices)


def crosses_slices(groups: Groups, slice_index: Int[np.ndarray, " devices"]) -> bool:
    """Whether a group has devices of several slices, which the slower network joins."""
    # [groups, members], and that of the first member
    indices = slice_index[groups]
    first_index = indices[:, :1]
    is_other = indices != first_index
    return bool(is_other.any())

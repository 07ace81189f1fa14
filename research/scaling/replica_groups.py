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
        return _listed(attributes["source_target_pairs"])
    text = attributes["replica_groups"]
    if text == "{}":
        return np.arange(num_devices)[None]
    if text.startswith("{"):
        return _listed(text)
    if text.startswith("mesh"):
        return _of_mesh(text, attributes)
    # `[4,2]<=[2,2,2]T(2,1,0)`: numbers 0 to 7 in order, as [2, 2, 2], transposed, as [4, 2]
    shape, _, source = text.partition("<=")
    return _iota(source).reshape(_numbers(shape))


def _listed(text: str) -> Groups:
    # `{{0,1},{2,3}}` -> [[0, 1], [2, 3]]
    return np.array([_numbers(group) for group in split(text[1:-1])])


def _of_mesh(text: str, attributes: Mapping[str, str]) -> Groups:
    """Returns the groups along some axes of XLA's own mesh.

    `mesh['a'=2,'b'=4], device_ids=([2,2,2]T(1,0,2)) {'a'}`: devices 0, 1, 4, 5, 2, 3, 6 and 7 as
    [2, 4], and the groups along the first axis.
    """
    mesh_text, _, joined_text = text.partition(" ")
    device_text = attributes.get("device_ids", "")
    if device_text:
        device_text, _, joined_text = device_text.partition(" ")

    names = []
    sizes = []
    for axis in split(mesh_text.removeprefix("mesh[").removesuffix("]")):
        name, _, size = axis.partition("=")
        names.append(name.strip())
        sizes.append(int(size))
    devices = np.arange(math.prod(sizes))
    if device_text:
        devices = _iota(device_text[1:-1]).reshape(-1)

    # An axis of 8 of which the groups take a part, `'a':(2)2`, is three: 2 × 2 × 2.
    shape = []
    joined = []
    parts = dict(_joined_axis(part) for part in split(joined_text.strip()[1:-1]))
    for name, size in zip(names, sizes, strict=True):
        before, width = parts.get(name, (1, 1))
        if name in parts and width == 0:
            width = size
        joined.append(len(shape) + 1)
        shape += [before, width, size // (before * width)]

    # [2, 4] joined along the first: [4, 2], one row a group.
    members = math.prod(shape[axis] for axis in joined)
    devices = np.moveaxis(devices.reshape(shape), joined, range(-len(joined), 0))
    return devices.reshape(-1, members)


def _joined_axis(text: str) -> tuple[str, tuple[int, int]]:
    """Returns the name of an axis, the size of its part before the joined one, and the size of
    that; 0 is all of it.
    """
    # `'a'` -> 1 and 0, `'a':(2)4` -> 2 and 4
    name, _, part = text.strip().partition(":")
    if not part:
        return name, (1, 0)
    before, _, width = part.removeprefix("(").partition(")")
    return name, (int(before), int(width))


def _iota(text: str) -> Int[np.ndarray, "..."]:
    """Returns device numbers in the order that `[4,2]T(1,0)` says, or the ones that `0,2,1,3`
    lists.
    """
    if not text.startswith("["):
        return np.array(_numbers(text))
    shape_text, _, permutation = text.partition("T")
    shape = _numbers(shape_text)
    devices = np.arange(math.prod(shape)).reshape(shape)
    if permutation:
        devices = devices.transpose(_numbers(permutation))
    return devices


def _numbers(text: str) -> list[int]:
    # `{0,1}`, `[4,2]`, `(1,0)` and `0,2` are lists of numbers.
    return [int(number) for number in text.strip().strip("{}[]()").split(",") if number]


def axes_between(groups: Groups, mesh: AnyMesh) -> tuple[str, ...]:
    """Returns the mesh axes along which devices of a group lie apart; a group may be a part of
    them.
    """
    # Devices 0 and 2 of data 2 × fsdp 2 × tensor 2 are (0, 0, 0) and (0, 1, 0): fsdp.
    coordinates = np.stack(np.unravel_index(groups, tuple(mesh.shape.values())))
    apart = (coordinates != coordinates[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, is_apart in zip(mesh.shape, apart, strict=True) if is_apart)


def slice_of_each(mesh: AnyMesh, slices: SlicesConfig) -> Int[np.ndarray, " devices"]:
    """Returns the slice that each device of a mesh is in, in the order of `mesh.devices.flat`.

    It is where the devices are, whatever the mesh makes of them; those of an abstract mesh are
    where `make_mesh` puts them.
    """
    if isinstance(mesh, AbstractMesh):
        # data 4 over 2 slices: coordinates 0 and 1 are in slice 0, 2 and 3 in slice 1.
        within = [size // slices.sizes()[name] for name, size in mesh.shape.items()]
        coordinates = np.indices(tuple(mesh.shape.values())).reshape(len(within), -1)
        places = coordinates // np.array(within)[:, None]
        return np.ravel_multi_index(tuple(places), tuple(slices.sizes().values()))

    devices = sorted(mesh.devices.flat, key=lambda device: device.id)
    index_of = {}
    for index, members in enumerate(split_slices(slices, devices)):
        index_of |= dict.fromkeys((device.id for device in members), index)
    return np.array([index_of[device.id] for device in mesh.devices.flat])


def crosses_slices(groups: Groups, slice_index: Int[np.ndarray, " devices"]) -> bool:
    """Whether a group has devices of several slices, which the slower network joins."""
    members = slice_index[groups]
    return bool((members != members[:, :1]).any())

"""The device mesh: six named axes, over devices in slices."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from research.core.errors import UserError
from research.parallel.mesh_axes import MESH_AXES
from research.parallel.mesh_config import MeshConfig, SlicesConfig, resolve_sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices` (all of them by default), laid out along their networks.

    Raises:
      UserError: the sizes do not fit the number of devices, or the slices.
    """
    if devices is None:
        devices = jax.devices()
    sizes = resolve_sizes(config, len(devices))
    groups = split_slices(config.slices, devices)
    across = config.slices.sizes()
    within = _sizes_within(sizes, across)

    # data 4 and tensor 2 in one slice are (4, 1, 1, 1, 1, 2).
    shape = tuple(within.values())
    laid_out = [_lay_out(shape, group) for group in groups]
    # 2 slices along data: slice i has replicas 4 i to 4 i + 3 of (8, 1, 1, 1, 1, 2).
    grid = np.empty(len(groups), dtype=object)
    grid[:] = laid_out
    blocks = grid.reshape(tuple(across.values()))
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return Mesh(np.block(blocks.tolist()), MESH_AXES, axis_types=axis_types)


def abstract_mesh(config: MeshConfig, num_devices: int, num_slices: int) -> AbstractMesh:
    """Returns the sizes of the mesh of devices that need not be here.

    Args:
      config: of the mesh.
      num_devices: in all slices.
      num_slices: which the devices say that they are in.

    Raises:
      UserError: as of `make_mesh`.
    """
    sizes = resolve_sizes(config, num_devices)
    _check_slices(config.slices, num_devices, num_slices)
    _sizes_within(sizes, config.slices.sizes())
    return AbstractMesh(tuple(sizes.values()), MESH_AXES)


def split_slices(slices: SlicesConfig, devices: Sequence[Any]) -> list[list[Any]]:
    """Returns the devices of each slice.

    TPUs say which slice they are in. Other devices are cut in order: those of a node follow each
    other.

    Raises:
      UserError: there are other slices than the config names.
    """
    count = math.prod(slices.sizes().values())
    named = {getattr(device, "slice_index", None) or 0 for device in devices}
    _check_slices(slices, len(devices), len(named))
    if len(named) > 1:
        return [
            [device for device in devices if (device.slice_index or 0) == index]
            for index in sorted(named)
        ]

    # 8 devices in 2 slices: 0 to 3, 4 to 7
    size = len(devices) // count
    return [list(devices[start : start + size]) for start in range(0, len(devices), size)]


def _check_slices(slices: SlicesConfig, num_devices: int, num_slices: int) -> None:
    """Raises UserError where devices in `num_slices` slices have no such slices; those of a single
    slice may be cut into several.
    """
    count = math.prod(slices.sizes().values())
    if num_slices > 1 and count != num_slices:
        raise UserError(
            "mesh.slices",
            count,
            f"in all, but the devices are in {num_slices} slices. Use mesh.slices.data = "
            f"{num_slices}, or other sizes with this product.",
        )
    if num_devices % count:
        raise UserError("mesh.slices", count, f"in all do not divide {num_devices} devices.")


def _sizes_within(sizes: dict[str, int], across: dict[str, int]) -> dict[str, int]:
    """Returns the axis sizes of one slice.

    Args:
      sizes: of the mesh.
      across: slices along each axis.
    """
    for name, size in sizes.items():
        if size % across[name]:
            raise UserError(
                f"mesh.slices.{name}", across[name], f"does not divide mesh.{name} = {size}."
            )
    return {name: size // across[name] for name, size in sizes.items()}


def _lay_out(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices of one slice as an array, neighbours along an axis near each other."""
    # An axis of a TPU's torus may be cut in two: tensor 8 on a torus of 4 × 4 × 4.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)

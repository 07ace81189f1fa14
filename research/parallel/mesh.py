"""The device mesh: six named axes, over devices in slices."""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from research.parallel.mesh_axes import MESH_AXES
from research.parallel.mesh_config import MeshConfig, resolve_sizes
from research.parallel.slices import check_slices, sizes_within, split_slices


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
    within = sizes_within(sizes, across)

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
    check_slices(config.slices, num_devices, num_slices)
    sizes_within(sizes, config.slices.sizes())
    return AbstractMesh(tuple(sizes.values()), MESH_AXES)


def _lay_out(shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Returns the devices of one slice as an array, neighbours along an axis near each other."""
    # An axis of a TPU's torus may be cut in two: tensor 8 on a torus of 4 × 4 × 4.
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)


def on_mesh(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which a model runs on a mesh; None is one device."""
    if mesh is None:
        return contextlib.nullcontext()
    return jax.set_mesh(mesh)

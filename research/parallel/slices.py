"""Slices of a mesh: groups of devices that a fast network connects, and a slower one joins."""

import math
from collections.abc import Sequence
from typing import Any

from research.core.errors import UserError
from research.parallel.divisibility import nearest_divisors
from research.parallel.mesh_config import SlicesConfig


def split_slices(slices: SlicesConfig, devices: Sequence[Any]) -> list[list[Any]]:
    """Returns the devices of each slice.

    TPUs say which slice they are in. Other devices are cut in order: those of a node follow each
    other.

    Raises:
      UserError: there are other slices than the config names.
    """
    count = math.prod(slices.sizes().values())
    named = {getattr(device, "slice_index", None) or 0 for device in devices}
    check_slices(slices, len(devices), len(named))
    if len(named) > 1:
        return [
            [device for device in devices if (device.slice_index or 0) == index]
            for index in sorted(named)
        ]

    # 8 devices in 2 slices: 0 to 3, 4 to 7
    size = len(devices) // count
    return [list(devices[start : start + size]) for start in range(0, len(devices), size)]


def check_slices(slices: SlicesConfig, num_devices: int, num_slices: int) -> None:
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
        advice = nearest_divisors(count, num_devices)
        raise UserError(
            "mesh.slices", count, f"in all do not divide {num_devices} devices. Use {advice}."
        )


def sizes_within(sizes: dict[str, int], across: dict[str, int]) -> dict[str, int]:
    """Returns the axis sizes of one slice.

    Args:
      sizes: of the mesh.
      across: slices along each axis.

    Raises:
      UserError: the slices do not divide an axis.
    """
    for name, size in sizes.items():
        if size % across[name]:
            advice = nearest_divisors(across[name], size)
            raise UserError(
                f"mesh.slices.{name}",
                across[name],
                f"does not divide mesh.{name} = {size}. Use {advice}.",
            )
    return {name: size // across[name] for name, size in sizes.items()}

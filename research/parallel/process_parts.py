"""Which part of a batch a process holds: its rows, and of each row its tokens."""

from collections.abc import Collection

import jax
from jax.sharding import NamedSharding, PartitionSpec

from research.core.errors import UserError


def process_rows(
    sharding: NamedSharding, batch_size: int, devices: Collection[jax.Device] | None = None
) -> tuple[int, int]:
    """Returns (i, n): of a batch cut into n even parts, a process holds the rows of part i.

    Where an axis that does not shard the batch spans processes, several of them hold the same part.

    Args:
      sharding: from `batch_sharding`.
      batch_size: rows of the batch over all processes, B.
      devices: of the process; None is this one.

    Raises:
      UserError: the rows of the process's devices are no such part.
    """
    # Two devices with rows 4 to 5 and 6 to 7 of a batch of 8: part 1 of 2.
    first, stop, size = _held(sharding, 0, batch_size, devices)
    contiguous = stop == first + size
    if not contiguous or first % size or batch_size % size:
        raise UserError(
            "mesh.tensor",
            sharding.mesh.shape["tensor"],
            ": the rows of a process are no even part of the batch. Use a divisor or a multiple "
            f"of the {_device_count(sharding, devices)} devices of a process.",
        )
    part = first // size
    parts = batch_size // size
    return part, parts


def process_columns(
    sharding: NamedSharding, length: int, devices: Collection[jax.Device] | None = None
) -> tuple[int, int]:
    """Returns (start, stop): of each row of a batch, the tokens that a process's devices hold.

    They are all of them where the length is not sharded over processes.

    Args:
      sharding: from `batch_sharding`.
      length: tokens of a row over all processes, T.
      devices: of the process; None is this one.

    Raises:
      UserError: the tokens do not follow each other.
    """
    # Devices with tokens 0 to 3 and 4 to 7 of a row of 16: (0, 8)
    start, stop, size = _held(sharding, 1, length, devices)
    if size != stop - start:
        raise UserError(
            "mesh.context",
            sharding.mesh.shape["context"],
            ": the tokens of a process do not follow each other in a row. Use a divisor or a "
            f"multiple of the {_device_count(sharding, devices)} devices of a process.",
        )
    return start, stop


def _held(
    sharding: NamedSharding, axis: int, size: int, devices: Collection[jax.Device] | None
) -> tuple[int, int, int]:
    """Returns the first index along an axis that some devices hold, the end, and how many."""
    if devices is None:
        devices = sharding.addressable_devices
    spec = PartitionSpec(sharding.spec[axis])
    along_axis = NamedSharding(sharding.mesh, spec)
    slices = along_axis.devices_indices_map((size,))

    # Devices that hold the same indices count once: {(0, 4), (4, 8)} -> (0, 8, 8)
    ranges = set()
    for device in devices:
        (indices,) = slices[device]
        start, stop, _ = indices.indices(size)
        ranges.add((start, stop))
    first = min(start for start, _ in ranges)
    end = max(stop for _, stop in ranges)
    count = sum(stop - start for start, stop in ranges)
    return first, end, count


def _device_count(sharding: NamedSharding, devices: Collection[jax.Device] | None) -> int:
    if devices is None:
        devices = sharding.addressable_devices
    return len(devices)

"""Sizes that mesh axes must divide, refused with those that would work."""

import math

from jax.sharding import AbstractMesh, Mesh

from research.core.errors import UserError
from research.parallel.mesh_axes import BATCH_AXES, CONTEXT_AXIS


def check_batch(batch_size: int, length: int, accumulation: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError where the mesh cannot shard every microbatch evenly.

    Args:
      batch_size: rows of the batch, B.
      length: tokens of a row, T.
      accumulation: microbatches of the batch.
      mesh: the devices.
    """
    # data 2, fsdp 2 and 2 microbatches: 8 parts; of 20 rows there should be 16.
    parts = math.prod(mesh.shape[name] for name in BATCH_AXES) * accumulation
    if batch_size % parts:
        fields = " × ".join(f"mesh.{name}" for name in BATCH_AXES)
        rows_of_part = max(1, batch_size // parts)
        raise UserError(
            "train.batch_size",
            batch_size,
            f"is not a multiple of {fields} × train.accumulation = {parts}. Use "
            f"{rows_of_part * parts}.",
        )

    shards = mesh.shape[CONTEXT_AXIS]
    if length % shards:
        tokens_of_shard = max(1, length // shards)
        raise UserError(
            "train.sequence_length",
            length,
            f"is not a multiple of mesh.context = {shards}. Use {tokens_of_shard * shards}.",
        )


def check_divides(
    mesh: Mesh | AbstractMesh, mesh_axes: str | tuple[str, ...] | None, size: int, what: str
) -> None:
    """Raises UserError where mesh axes together do not divide a size.

    Args:
      mesh: the devices.
      mesh_axes: of a `PartitionSpec`, for one axis of an array.
      size: of that axis.
      what: it is, with its size.
    """
    if mesh_axes is None:
        return
    names = (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes
    # ("data", "fsdp", "expert") of sizes 4, 1 and 3: the error names data and expert.
    used = [name for name in names if mesh.shape[name] > 1]
    shards = math.prod(mesh.shape[name] for name in used)
    if size % shards == 0:
        return
    fields = " × ".join(f"mesh.{name}" for name in used)
    together = "" if len(used) == 1 else " together"
    raise UserError(
        fields, shards, f"does not divide {what}. Use {_divisors(size, mesh.size)}{together}."
    )


def nearest_divisors(near: int, size: int) -> str:
    """Returns the divisors of a size that are next to a number, in words.

    Args:
      near: which; it is at least 1.
      size: that is divided.
    """
    # 3 of 8 -> "2 or 4", 16 of 8 -> "8"
    divisors = [n for n in range(1, size + 1) if size % n == 0]
    below = [n for n in divisors if n <= near]
    above = [n for n in divisors if n > near]
    return " or ".join(str(n) for n in below[-1:] + above[:1])


def _divisors(size: int, limit: int) -> str:
    # 12 up to 8 -> "1, 2, 3, 4 or 6"
    *others, largest = [str(n) for n in range(1, limit + 1) if size % n == 0]
    if not others:
        return largest
    listed = ", ".join(others)
    return f"{listed} or {largest}"

"""Reading a checkpoint by all processes of a run: one that a process cannot read, none may use."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from research.storage.paths import Path
from research.training import checkpoint_files as files
from research.training.checkpoint_files import Damaged

Content = TypeVar("Content")
ShapesFor = Callable[[Mapping[str, Any]], dict[str, jax.ShapeDtypeStruct]]


def read_whole(
    folder: Path, shapes_for: ShapesFor, exact: bool
) -> tuple[dict[str, Any], dict[str, jax.Array]]:
    """Returns (manifest, canonical arrays) of a checkpoint, of which each process reads what its
    devices hold.

    Args:
      folder: of the checkpoint.
      shapes_for: from its manifest to the canonical shapes of the arrays to read.
      exact: whether it may have no other arrays.

    Raises:
      Damaged: on all processes, where one cannot read its part or it is not what was saved.
      UserError: the checkpoint is of another architecture.
    """

    def read(folder: Path) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        manifest = files.read_manifest(folder)
        shapes = shapes_for(manifest)
        files.check_architecture(folder, manifest, shapes, exact)
        return manifest, files.read_arrays(folder, manifest, shapes)

    manifest, arrays = read_by_all(read, folder)
    files.check_digests(manifest, arrays)
    return manifest, arrays


def read_by_all(read: Callable[[Path], Content], folder: Path) -> Content:
    """Returns what each process reads of a checkpoint; raises Damaged on all of them where one
    cannot.
    """
    damage = None
    content = None
    try:
        content = read(folder)
    except Damaged as error:
        damage = error

    # What one process cannot read, none may use: digests over all processes need all of them. So
    # each learns of the others' damage before it raises its own.
    damaged = np.bool_(damage is not None)
    damaged_processes = multihost_utils.process_allgather(damaged)
    if damage is not None:
        raise damage
    if np.any(damaged_processes):
        raise Damaged("another process cannot read its part")
    assert content is not None
    return content

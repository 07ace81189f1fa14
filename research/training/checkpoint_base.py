"""Parameters that a run never changes: written once beside its checkpoints, which name them by
place and digest.

    checkpoints/base-<digest>/arrays/…   OCDBT files, one tree of canonical arrays by the
    parameters' names

The manifest of a checkpoint describes these arrays like all others, and says of each that it lies
in that folder. The folder's name follows from the bits in it: a run that trains other parameters
from some step on leaves it as it is.
"""

import hashlib
import json
import logging
from collections.abc import Collection
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import Array

from research.core.errors import UserError
from research.core.trees import named_leaves
from research.models.layer_stack import canonical, canonical_names, stack_layers
from research.storage.digests import digests
from research.storage.files import remove_folder
from research.storage.json_files import read_object
from research.storage.paths import Path
from research.training import checkpoint_files as files

logger = logging.getLogger("tessera")

# The fields of a state that hold a whole set of parameters. In the average, too, frozen parameters
# are what they were.
_FIELDS = ("params", "ema")


class FrozenParams:
    """The frozen parameters of a run on disk. All processes call its methods together.

    Args:
      folder: of the checkpoints.
      frozen: names of the parameters that no step changes, as the model has them.
    """

    def __init__(self, folder: Path, frozen: Collection[str]):
        self._folder, self._frozen = folder, frozenset(frozen)
        # What the manifests say of each array by its canonical name; None before the first
        # checkpoint is written.
        self._entries: dict[str, dict[str, Any]] | None = None
        self._whole: frozenset[str] = frozenset()

    def note_restored(self, manifest: dict[str, Any]) -> None:
        """Takes note of a checkpoint that was read and is whole: its frozen parameters need not be
        written again.
        """
        self._whole = files.shared_folders_named(manifest)

    def split_state(
        self, state: Any, checkpointer: ocp.AsyncCheckpointer
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Returns the canonical arrays that a checkpoint holds itself, and what its manifest says
        of the others.

        The first call writes the others, unless the checkpoint that the run was restored from has
        them; so does a call that finds their folder gone.
        """
        if not self._frozen:
            return canonical(state), {}
        named = named_leaves(state)
        resting = self._resting(named)
        if self._entries is None or any(map(self._is_gone, self._places())):
            arrays = stack_layers({name: named[f"params/{name}"] for name in resting})
            self._entries = self._write(arrays, checkpointer)
        left_out = {f"{field}/{name}" for field in _FIELDS for name in resting}
        held = {name.partition("/")[0] for name in named.keys() & left_out}
        entries = {
            f"{field}/{name}": entry
            for field in sorted(held)
            for name, entry in self._entries.items()
        }
        return stack_layers(
            {name: leaf for name, leaf in named.items() if name not in left_out}
        ), entries

    def _resting(self, named: dict[str, Array]) -> list[str]:
        """Returns the frozen parameters, but for layers that lie in one array with layers that are
        trained.
        """
        params = {
            name.partition("/")[2]: leaf
            for name, leaf in named.items()
            if name.startswith("params/")
        }
        where = canonical_names(params)
        changing = {stack for name, (stack, _) in where.items() if name not in self._frozen}
        return [name for name, (stack, _) in where.items() if stack not in changing]

    def _write(
        self, arrays: dict[str, Array], checkpointer: ocp.AsyncCheckpointer
    ) -> dict[str, dict[str, Any]]:
        described = files.describe_arrays(arrays, digests(arrays))
        place = files.shared_folder_name(
            hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()
        )
        if described and (place not in self._whole or self._is_gone(place)):
            # A folder of this name that was not read just now may be damaged, or half written.
            if jax.process_index() == 0:
                remove_folder(self._folder / place)
            checkpointer.save(self._folder / place, args=files.arrays_save_args(arrays))
            checkpointer.wait_until_finished()
        return {name: entry | {"place": place} for name, entry in described.items()}

    def _places(self) -> set[str]:
        """Returns the folder that was written or read, if there is one."""
        return {entry["place"] for entry in (self._entries or {}).values()}

    def _is_gone(self, place: str) -> bool:
        """Whether somebody has removed a folder that was whole; process 0 says it for all."""
        there = (self._folder / place / files.ARRAYS / "_METADATA").exists()
        return not bool(multihost_utils.broadcast_one_to_all(np.bool_(there)))


def remove_unused_folders(folder: Path) -> None:
    """Removes the folders of frozen parameters that no checkpoint names, nor one that was set
    aside.

    One that stays costs room and no more, so it ends no run.
    """
    bases = files.shared_folders(folder)
    used: set[str] = set()
    for path in folder.glob(f"*/{files.MANIFEST}/manifest.json") if bases else ():
        try:
            used |= files.shared_folders_named(read_object(path)["content"])
        except (UserError, LookupError, TypeError, AttributeError):
            return  # of a damaged checkpoint it cannot be told what it needs
    for path in bases:
        if path.name not in used:
            try:
                remove_folder(path)
            except OSError as error:
                logger.warning("%s is no longer needed, but cannot be removed: %s", path, error)

"""Frozen parameters, which no step changes: written once, in a folder that checkpoints share.

    checkpoints/base-<digest>/arrays/…   OCDBT store, one tree of canonical arrays by the
                                         parameters' names

The manifest of a checkpoint describes these arrays like all others, and names the folder that each
is in. The folder's name follows from the bits of its arrays: a run that freezes other parameters
from some step on writes another folder.
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
from research.models.canonical_params import canonical, canonical_names, stack_layers
from research.storage.digests import digests
from research.storage.files import remove_folder
from research.storage.json_files import read_object
from research.storage.paths import Path
from research.training import checkpoint_files as files
from research.training import orbax_tree

logger = logging.getLogger("tessera")

# The fields of a state that hold a set of all parameters. The average of a frozen parameter is that
# parameter.
_FIELDS = ("params", "ema")


class FrozenParams:
    """The frozen parameters of a run on disk. All processes call its methods together.

    Args:
      folder: of the checkpoints.
      frozen: names of the parameters that no step changes, as the model has them.
    """

    def __init__(self, folder: Path, frozen: Collection[str]):
        self._folder = folder
        self._frozen_names = frozenset(frozen)
        # The manifest's entry of each array by its canonical name; None before the first save.
        self._entries: dict[str, dict[str, Any]] | None = None
        # Names of shared folders that were read and are intact.
        self._intact: frozenset[str] = frozenset()

    def note_restored(self, manifest: dict[str, Any]) -> None:
        """Remembers that a checkpoint is intact: its frozen parameters are not written again."""
        self._intact = files.shared_folders_named(manifest)

    def save_frozen(
        self, state: Any, checkpointer: ocp.AsyncCheckpointer
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """Writes the frozen parameters if their folder does not have them; returns the other
        canonical arrays, and the manifest entries of the frozen ones.

        The first call writes them, unless the checkpoint that the run was restored from has them;
        so does a call that finds their folder gone. It returns when they are on the disk.
        """
        if not self._frozen_names:
            return canonical(state), {}

        named = named_leaves(state)
        shareable = self._shareable(named)
        if self._entries is None or any(map(self._is_gone, self._folder_names())):
            arrays = stack_layers({name: named[f"params/{name}"] for name in shareable})
            self._entries = self._write(arrays, checkpointer)

        # embed -> params/embed, and ema/embed where the state has an ema
        shared = {f"{field}/{name}" for field in _FIELDS for name in shareable}
        fields = {name.partition("/")[0] for name in named.keys() & shared}
        entries = {
            f"{field}/{name}": entry
            for field in sorted(fields)
            for name, entry in self._entries.items()
        }
        own = {name: leaf for name, leaf in named.items() if name not in shared}
        return stack_layers(own), entries

    def _shareable(self, named: dict[str, Array]) -> list[str]:
        """Returns the frozen parameters that share no array on disk with trained ones.

        Of a stack of layers where the last is trained, no layer is shareable.
        """
        params = {
            name.removeprefix("params/"): leaf
            for name, leaf in named.items()
            if name.startswith("params/")
        }
        stack_and_layer = canonical_names(params)
        trained = {
            stack for name, (stack, _) in stack_and_layer.items() if name not in self._frozen_names
        }
        return [name for name, (stack, _) in stack_and_layer.items() if stack not in trained]

    def _write(
        self, arrays: dict[str, Array], checkpointer: ocp.AsyncCheckpointer
    ) -> dict[str, dict[str, Any]]:
        """Writes arrays into their shared folder, where it is not intact; returns their entries."""
        entries = files.describe_arrays(arrays, digests(arrays))
        # The name is of the content: equal parameters of two checkpoints are in one folder.
        content = json.dumps(entries, sort_keys=True)
        digest = hashlib.sha256(content.encode())
        folder_name = files.shared_folder_name(digest.hexdigest())

        if entries and (folder_name not in self._intact or self._is_gone(folder_name)):
            folder = self._folder / folder_name
            # A folder of this name that this run did not read may be damaged or incomplete.
            if jax.process_index() == 0:
                remove_folder(folder)
            checkpointer.save(folder, args=files.arrays_save_args(arrays))
            checkpointer.wait_until_finished()

        shared = {files.SHARED_FOLDER_KEY: folder_name}
        return {name: entry | shared for name, entry in entries.items()}

    def _folder_names(self) -> set[str]:
        """Returns the name of the folder that was written or read, if there is one."""
        entries = self._entries or {}
        return {entry[files.SHARED_FOLDER_KEY] for entry in entries.values()}

    def _is_gone(self, folder_name: str) -> bool:
        """Whether an intact folder has been removed; process 0 decides for all."""
        metadata = self._folder / folder_name / files.ARRAYS / orbax_tree.FILE
        exists = np.bool_(metadata.exists())
        # File systems may show a removal to one process earlier than to another.
        exists = multihost_utils.broadcast_one_to_all(exists)
        return not bool(exists)


def remove_unused_folders(folder: Path) -> None:
    """Removes the shared folders that no checkpoint names, nor one that was set aside.

    One that cannot be removed only takes disk space: this is logged, and the run goes on.
    """
    shared = files.shared_folders(folder)
    if not shared:
        return
    used: set[str] = set()
    for path in folder.glob(f"*/{files.MANIFEST}/manifest.json"):
        try:
            used |= files.shared_folders_named(read_object(path)["content"])
        except (UserError, LookupError, TypeError, AttributeError):
            # What a damaged checkpoint needs is unknown.
            return

    for path in shared:
        if path.name in used:
            continue
        try:
            remove_folder(path)
        except OSError as error:
            logger.warning("%s is no longer needed, but cannot be removed: %s", path, error)

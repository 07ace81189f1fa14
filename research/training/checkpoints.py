"""Checkpoints of a run: written atomically in the background, checked when they are read.

`<workdir>/checkpoints/<step>/` is one checkpoint (checkpoint_files.py); for other names there see
checkpoint_folder.py. All processes of a run share the folder, and call the methods of `Checkpoints`
together.
"""

import concurrent.futures
import contextlib
import gc
import logging
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from research.core.errors import UserError
from research.core.trees import named_leaves
from research.models.canonical_params import stack_layers, unstack_layers
from research.storage.paths import Path, in_bucket
from research.training import checkpoint_files as files
from research.training import checkpoint_shards, manifest_values, quiet_orbax
from research.training.checkpoint_faults import disk_fault, release_frames
from research.training.checkpoint_files import Damaged
from research.training.checkpoint_folder import CheckpointFolder
from research.training.checkpoint_frozen import FrozenParams, remove_unused_folders
from research.training.checkpoint_reading import read_by_all, read_whole

logger = logging.getLogger("tessera")

Content = TypeVar("Content")


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep.

    Attributes:
      every: steps from one checkpoint to the next.
      keep: how many of the latest checkpoints stay on disk, at least 1. While one is being written
          there is one more.
      keep_every: checkpoints at multiples of this many steps are never removed; None keeps only the
          latest.
      asynchronous: write in the background while training continues; False waits for each write.
    """

    every: int = 1000
    keep: int = 2
    keep_every: int | None = None
    asynchronous: bool = True

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError("every", self.every, "must be at least 1 step.")
        if self.keep < 1:
            raise UserError(
                "keep", self.keep, "must be at least 1: a run resumes from the latest checkpoint."
            )
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.every):
            raise UserError(
                "keep_every",
                self.keep_every,
                f"must be a multiple of every = {self.every}, or None.",
            )


class Checkpoints:
    """The checkpoints of one workdir. Nothing on disk changes before the first `save`.

    Args:
      workdir: whose they are.
      config: when to save, and what to keep.
      frozen: names of the parameters that no step changes: they are written once, not with every
          checkpoint.
    """

    def __init__(self, workdir: Path, config: CheckpointConfig, frozen: Collection[str] = ()):
        self._config = config
        self._folder = CheckpointFolder(workdir)
        self._frozen_params = FrozenParams(self._folder.path, frozen)
        self._checkpointer = files.checkpointer(self._folder.path)
        # Waits for the one write in flight, then removes what need not be kept.
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._in_flight: tuple[int, concurrent.futures.Future[None]] | None = None
        self._last_step = 0  # the last step whose write began
        self._skipped: set[int] = set()  # damaged ones, newer than the one restored
        self._tidied = False
        self._failed = False
        # Open while a write is in flight. After a failed one it stays open until `close`, since
        # other arrays of it are still being written.
        self._silence = contextlib.ExitStack()

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, intact or damaged, oldest first."""
        return self._folder.steps()

    @property
    def latest(self) -> int | None:
        """The newest step that has a checkpoint; None where a run starts at step 0."""
        return max(self.steps(), default=None)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after this step."""
        return step % self._config.every == 0

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint; waits first for the one in flight, if there is one.

        When this returns, `state` may be donated. A checkpoint that exists is not written again.

        Args:
          step: how many steps `state` has taken.
          state: a pytree of arrays. Random keys are not among them: randomness is a function of
              (seed, step).
          extra: JSON values and small NumPy arrays that belong to it (the loader's position,
            counters, …), the same on all processes.

        Raises:
          UserError: the disk is full or cannot be written, or the workdir is gone, now or for the
            checkpoint before; or a later step has its checkpoint already.
        """
        self.wait()
        self._folder.check_workdir()
        existing = [old for old in self.steps() if old not in self._skipped]
        if step in existing:
            return
        if existing and existing[-1] > step:
            raise UserError(
                f"{self._folder.of_step(existing[-1])} is newer than step {step}: restore it, or "
                "move it away."
            )

        self._tidy()
        self._silence.enter_context(quiet_orbax.silenced())
        self._last_step = step
        try:
            arrays, shared = self._frozen_params.save_frozen(state, self._checkpointer)
            content = files.save_args(step, arrays, shared, extra)
            self._checkpointer.save(self._folder.of_step(step), args=content)
        except Exception as error:
            self._raise_explained(step, error)

        self._in_flight = (step, self._background.submit(self._finish, step))
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when no write is in flight; raises what went wrong with it.

        Raises:
          UserError: the disk is full or cannot be written, and earlier checkpoints are intact; or
              the workdir is gone.
        """
        if self._in_flight is None:
            return
        step, write = self._in_flight
        self._in_flight = None
        try:
            write.result()
        except Exception as error:
            self._note_failure(error)
            self._check_workdir(step)
            folder = self._folder.path
            if not in_bucket(folder) and not folder.is_dir():
                raise UserError(
                    f"{folder} was deleted while checkpoint {step} was written."
                ) from error
            self._raise_explained(step, error)
        self._check_workdir(step)
        self._silence.close()

    def close(self) -> None:
        """Waits, then releases the threads."""
        try:
            self.wait()
        finally:
            self._background.shutdown()
            if self._failed:
                self._drain()
            self._checkpointer.close()
            if self._failed:
                self._collect_failed_tasks()
            self._silence.close()
            # Other arrays of a failed write may have been written since.
            if jax.process_index() == 0:
                self._folder.remove_recreated(self._last_step)

    def restore(
        self, abstract_state: Any, step: int | None = None
    ) -> tuple[int, Any, dict[str, Any]]:
        """Returns (step, state, extra) of the newest intact checkpoint.

        Each damaged one is named in a warning.

        Args:
          abstract_state: the state's shapes, types and shardings, which may be of another mesh than
            the saved ones; its layers may be scanned or unrolled.
          step: this checkpoint and no other.

        Raises:
          UserError: there is no checkpoint, none is intact, or the newest is of another
              architecture.
        """
        shapes = _shapes(abstract_state)
        wanted = stack_layers(shapes)
        step, (manifest, arrays) = self._newest_intact(
            lambda folder: read_whole(folder, lambda manifest: wanted, exact=True), step
        )

        state = _rebuild(abstract_state, unstack_layers(arrays, shapes))
        self._frozen_params.note_restored(manifest)
        self._skipped = {later for later in self.steps() if later > step}
        return step, state, manifest_values.decode(manifest["extra"])

    def restore_params(
        self, abstract_params: Any, step: int | None = None, fields: tuple[str, ...] = ("params",)
    ) -> tuple[int, Any]:
        """Returns (step, params) without reading the rest of the state.

        Args:
          abstract_params: as in `restore`, of the parameters alone.
          step: this checkpoint and no other.
          fields: the state's fields to look for; the first that the checkpoint has is read: ("ema",
            "params") prefers averaged parameters.

        Raises:
          UserError: as `restore`.
        """
        shapes = _shapes(abstract_params)
        canonical_shapes = stack_layers(shapes)

        def shapes_for(manifest: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
            field = files.first_field(manifest, fields)
            return {f"{field}/{name}": shape for name, shape in canonical_shapes.items()}

        step, (_, arrays) = self._newest_intact(
            lambda folder: read_whole(folder, shapes_for, exact=False), step
        )
        # params/layers/mlp/kernel -> layers/mlp/kernel
        arrays = {name.partition("/")[2]: array for name, array in arrays.items()}
        return step, _rebuild(abstract_params, unstack_layers(arrays, shapes))

    def stream_params(
        self, stored: Any, wanted: Any, fields: tuple[str, ...] = ("params",)
    ) -> tuple[int, Any]:
        """Returns (step, params) in the types that they are served in, never all of them in the
        types of the checkpoint: they are read a part at a time (checkpoint_shards.py).

        Args:
          stored: shapes and types of the parameters as they were saved, in the tree of the model;
            its layers may be scanned or unrolled.
          wanted: shapes, types and shardings that they are served in, on devices of this process.
          fields: as in `restore_params`.

        Raises:
          UserError: as `restore`.
        """

        def read(folder: Path) -> dict[str, jax.Array]:
            manifest = files.read_manifest(folder)
            field = files.first_field(manifest, fields)
            return checkpoint_shards.read_params(
                folder, manifest, field, named_leaves(stored), named_leaves(wanted)
            )

        step, params = self._newest_intact(lambda folder: read_by_all(read, folder), None)
        return step, _rebuild(wanted, params)

    def params_digest(self, step: int, fields: tuple[str, ...] = ("params",)) -> bytes:
        """Returns the digest of the parameters of an intact checkpoint, which are not read for it;
        `fields` as in `restore_params`.
        """
        manifest = files.read_manifest(self._folder.of_step(step))
        return files.params_digest(manifest, files.first_field(manifest, fields))

    def _newest_intact(
        self, read: Callable[[Path], Content], step: int | None
    ) -> tuple[int, Content]:
        """Returns (step, content) of the newest intact checkpoint, the same on all processes.

        Args:
          read: returns the content of a checkpoint, or raises Damaged on all processes.
          step: this checkpoint and no other.
        """
        self.wait()
        candidates = self.steps()
        if step is not None:
            candidates = [each for each in candidates if each == step]
        if not candidates:
            of_step = "" if step is None else f" of step {step}"
            raise UserError(f"{self._folder.path} has no checkpoint{of_step}.")

        faults = []
        while candidates:
            newest = np.int32(candidates.pop())
            candidate = int(multihost_utils.broadcast_one_to_all(newest))
            folder = self._folder.of_step(candidate)
            try:
                return candidate, read(folder)
            except Damaged as damage:
                fault = f"{folder}: {damage}"
                faults.append(fault)
                then = " Trying the one before." if candidates else ""
                logger.warning("Damaged checkpoint %s.%s", fault, then)
        raise UserError(f"no checkpoint is intact, and none was changed: {'; '.join(faults)}.")

    def _finish(self, step: int) -> None:
        """In the background: waits for a write, and removes the checkpoints that are not kept."""
        self._checkpointer.wait_until_finished()
        if jax.process_index() != 0:
            return
        steps = self.steps()
        kept = set(steps[-self._config.keep :])
        if self._config.keep_every is not None:
            kept |= {old for old in steps if old % self._config.keep_every == 0}
        for old in steps:
            if old not in kept:
                self._folder.remove(old)
        remove_unused_folders(self._folder.path)

    def _tidy(self) -> None:
        """Before the first save: removes what killed runs left, sets damaged checkpoints aside."""
        if jax.process_index() == 0 and self._folder.path.is_dir():
            if not self._tidied:
                self._folder.remove_unfinished()
            self._folder.set_aside(self._skipped)
        self._skipped = set()
        self._tidied = True

    def _note_failure(self, error: Exception) -> None:
        """Remembers that a write has failed, and releases the tasks that wrote other arrays."""
        self._failed = True
        release_frames(error)

    def _raise_explained(self, step: int, error: Exception) -> None:
        """Removes what a failed write has left, and raises what its error means to the user."""
        self._note_failure(error)
        if jax.process_index() == 0:
            self._folder.remove_failed(step)
            remove_unused_folders(self._folder.path)
        self._check_workdir(step)

        fault = disk_fault(error)
        if fault is None:
            raise error
        earlier = "There is no earlier checkpoint"
        if self.steps():
            earlier = "Earlier checkpoints are intact"
        raise UserError(
            f"{self._folder.of_step(step)}: {fault}; it was not written. {earlier}."
        ) from error

    def _check_workdir(self, step: int) -> None:
        """Raises UserError where the workdir was deleted, after the write of a step is undone."""
        if jax.process_index() == 0:
            self._folder.remove_recreated(step)
        self._folder.check_workdir()

    def _drain(self) -> None:
        """Waits for the rest of a failed write. Orbax raises each of its errors once."""
        while True:
            try:
                self._checkpointer.wait_until_finished()
                return
            except Exception as error:
                # The first was raised by `wait`.
                logger.debug("Another error of a checkpoint that was not written: %s", error)

    def _collect_failed_tasks(self) -> None:
        """Collects the tasks that wrote other arrays of a failed write while it is silent.

        They report their errors when they are collected. The old writer refers to some of them.
        """
        self._checkpointer = files.checkpointer(self._folder.path)
        # "coroutine … was never awaited"
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):
            gc.collect()


def _shapes(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, types and shardings by name; without a sharding an array is on one device."""
    shapes = {}
    for name, leaf in named_leaves(tree).items():
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes[name] = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return shapes


def _rebuild(like: Any, named: Mapping[str, jax.Array]) -> Any:
    """Returns named arrays, in the order of the leaves of `like`, as a tree of its structure."""
    return jax.tree.unflatten(jax.tree.structure(like), list(named.values()))

"""Checkpoints of a run: written while training goes on, whole or not at all, checked when read.

`<workdir>/checkpoints/<step>/` holds one checkpoint. A folder of another name there is never taken
for one: Orbax writes into `<step>.orbax-checkpoint-tmp…` and renames it when all is in it; an old
checkpoint is renamed to `<step>.deleted` before its files go; a damaged one that training has gone
back behind becomes `<step>.set-aside`. In a bucket, where nothing is renamed at once, a folder is a
checkpoint when `commit_success.txt` is in it: Orbax writes that file last, and it is the first that
goes.

All processes of a run share the folder, and call the methods of `Checkpoints` together.
"""

import concurrent.futures
import contextlib
import errno
import gc
import logging
import os
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from research.core.errors import UserError
from research.core.trees import named_leaves
from research.models.layer_stack import stack_layers, unstack_layers
from research.storage.files import remove_folder
from research.storage.paths import Path, absolute, in_bucket
from research.training import checkpoint_files as files
from research.training import manifest_values, quiet_orbax
from research.training.checkpoint_base import FrozenParams, remove_unused_folders
from research.training.checkpoint_files import Damaged
from research.training.presence import Presence

logger = logging.getLogger("tessera")

LAST_STEP = 2**31 - 1  # steps are counted in 32 bits
# Faults of a disk that the user can mend. TensorStore gives no number, only the system's words for
# it.
DISK_FAULTS = tuple(
    os.strerror(number)
    for number in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.ESTALE,
    )
)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, and what to keep.

    Attributes:
      every: steps from one checkpoint to the next.
      keep: how many of the latest checkpoints stay on disk, at least 1. While one is written there
          is one more.
      keep_every: checkpoints at multiples of this many steps stay for ever; None keeps only the
          latest.
      asynchronous: write in the background while training goes on; False waits for each write.
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
        self._folder, self._config = absolute(workdir) / "checkpoints", config
        self._base = FrozenParams(self._folder, frozen)
        self._presence = Presence(self._folder.parent, "config.json")
        self._checkpointer = files.checkpointer(self._folder)
        # Waits for the one write in flight, then removes what need not be kept.
        self._background = concurrent.futures.ThreadPoolExecutor(1, "checkpoints")
        self._last_step = 0  # the last step whose writing began
        self._in_flight: tuple[int, concurrent.futures.Future[None]] | None = None
        self._passed_over: set[int] = set()  # steps newer than the one restored
        # As long as a write is under way; after one that failed until `close`, for other arrays of
        # it go on.
        self._silence = contextlib.ExitStack()
        self._tidied, self._failed = False, False
        self._strange: set[str] = set()  # names of folders that were said to be no checkpoints

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, whole or damaged, oldest first."""
        if not self._folder.is_dir():
            return []
        steps = []
        for path in sorted(path for path in self._folder.iterdir() if path.name.isdecimal()):
            name = path.name
            if in_bucket(path) and not files.is_complete(path):
                continue  # one that is being written
            if (
                len(name) <= len(str(LAST_STEP))
                and name == str(int(name))
                and int(name) <= LAST_STEP
            ):
                steps.append(int(name))
            elif name not in self._strange:
                self._strange.add(name)
                logger.warning("%s is passed over: no step is called that.", path)
        return sorted(steps)

    @property
    def latest(self) -> int | None:
        """The newest step that has a checkpoint, or None; a run starts at step 0 only when this is
        None.
        """
        return max(self.steps(), default=None)

    def due(self, step: int) -> bool:
        """Whether a checkpoint is to be saved after this step."""
        return step % self._config.every == 0

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint; waits first for the one in flight, if there is one.

        When this returns, `state` may be donated. A step that has its checkpoint already is left as
        it is.

        Args:
          step: how many steps `state` has seen.
          state: a pytree of arrays. Random keys are not among them: randomness is a function of
              (seed, step).
          extra: JSON values and small NumPy arrays that belong to it (the loader's position,
            counters, …), the same on all processes.

        Raises:
          UserError: the disk is full or cannot be written, or the workdir is gone, now or for the
            checkpoint before; or a later step has its checkpoint already.
        """
        self.wait()
        self._presence.check()
        held = [old for old in self.steps() if old not in self._passed_over]
        if step in held:
            return
        if held and held[-1] > step:
            raise UserError(
                f"{self._folder / str(held[-1])} is newer than step {step}: restore it, or move "
                "it away."
            )
        self._tidy()
        self._silence.enter_context(quiet_orbax.silenced())
        self._last_step = step
        try:
            arrays, elsewhere = self._base.split_state(state, self._checkpointer)
            contents = files.save_args(step, arrays, elsewhere, extra)
            self._checkpointer.save(self._folder / str(step), args=contents)
        except Exception as error:
            self._explain(step, error)
        self._in_flight = step, self._background.submit(self._finish, step)
        if not self._config.asynchronous:
            self.wait()

    def wait(self) -> None:
        """Returns when no write is in flight; what went wrong with it is raised here.

        Raises:
          UserError: the disk is full or cannot be written, and earlier checkpoints are whole; or
              the workdir is gone.
        """
        if self._in_flight is None:
            return
        step, future = self._in_flight
        self._in_flight = None
        try:
            future.result()
        except Exception as error:
            self._fail(error)
            self._check_workdir(step)
            if not in_bucket(self._folder) and not self._folder.is_dir():
                raise UserError(
                    f"{self._folder} was deleted while checkpoint {step} was written."
                ) from error
            self._explain(step, error)
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
                # Tasks that wrote other arrays report their errors when they are collected. The old
                # writer holds some.
                self._checkpointer = files.checkpointer(self._folder)
                with warnings.catch_warnings(
                    action="ignore", category=RuntimeWarning
                ):  # "was never awaited"
                    gc.collect()
            self._silence.close()
            # Writes of other arrays may have gone on after the first that failed.
            self._remove_made_again(self._last_step)

    def _drain(self) -> None:
        """Waits for the rest of a write that failed. Orbax raises each of its errors once, and
        `wait` has told one.
        """
        while True:
            try:
                self._checkpointer.wait_until_finished()
                return
            except Exception as error:
                logger.debug("Another error of a checkpoint that was not written: %s", error)

    def restore(
        self, abstract_state: Any, step: int | None = None
    ) -> tuple[int, Any, dict[str, Any]]:
        """Returns (step, state, extra) of the newest whole checkpoint; each damaged one is named in
        a warning.

        Args:
          abstract_state: the state's shapes, types and shardings, which may be of another mesh than
            the saved ones; its layers may be scanned or unrolled.
          step: this checkpoint and no other.

        Raises:
          UserError: there is no checkpoint, none is whole, or the newest is of another
              architecture.
        """
        shapes = _shapes(abstract_state)
        wanted = stack_layers(shapes)
        step, manifest, arrays = self._newest_whole(lambda manifest: wanted, step, whole=True)
        state = _rebuild(abstract_state, unstack_layers(arrays, shapes))
        self._base.note_restored(manifest)
        self._passed_over = {later for later in self.steps() if later > step}
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

        def wanted(manifest: Mapping[str, Any]) -> dict[str, jax.ShapeDtypeStruct]:
            held = {name.partition("/")[0] for name in manifest["arrays"]}
            field = next((field for field in fields if field in held), fields[-1])
            return {f"{field}/{name}": shape for name, shape in stack_layers(shapes).items()}

        step, _, arrays = self._newest_whole(wanted, step, whole=False)
        arrays = {name.partition("/")[2]: array for name, array in arrays.items()}
        return step, _rebuild(abstract_params, unstack_layers(arrays, shapes))

    def _newest_whole(
        self,
        wanted: Callable[[Mapping[str, Any]], dict[str, jax.ShapeDtypeStruct]],
        step: int | None,
        whole: bool,
    ) -> tuple[int, dict[str, Any], dict[str, jax.Array]]:
        """Returns (step, manifest, canonical arrays), the same step on all processes."""
        self.wait()
        steps = [of for of in self.steps() if step in (None, of)]
        if not steps:
            raise UserError(
                f"{self._folder} has no checkpoint{'' if step is None else f' of step {step}'}."
            )
        faults = []
        while steps:
            candidate = int(multihost_utils.broadcast_one_to_all(np.int32(steps.pop())))
            try:
                return candidate, *self._read(self._folder / str(candidate), wanted, whole)
            except Damaged as damage:
                faults.append(f"{self._folder / str(candidate)}: {damage}")
                logger.warning(
                    "Damaged checkpoint %s.%s",
                    faults[-1],
                    " Trying the one before." if steps else "",
                )
        raise UserError(f"no checkpoint is whole, and none was changed: {'; '.join(faults)}.")

    def _read(
        self,
        folder: Path,
        wanted: Callable[[Mapping[str, Any]], dict[str, jax.ShapeDtypeStruct]],
        whole: bool,
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        fault, manifest, arrays = None, {}, {}
        try:
            manifest = files.read_manifest(folder)
            shapes = wanted(manifest)
            files.check_architecture(folder, manifest, shapes, whole)
            arrays = files.read_arrays(folder, manifest, shapes)
        except Damaged as damage:
            fault = damage
        # What one process cannot read, none may use: the digests below need all of them.
        if np.any(multihost_utils.process_allgather(np.bool_(fault is not None))):
            raise fault or Damaged("another process cannot read its part")
        files.check_digests(manifest, arrays)
        return manifest, arrays

    def _finish(self, step: int) -> None:
        self._checkpointer.wait_until_finished()
        if jax.process_index() == 0:
            kept = set(self.steps()[-self._config.keep :])
            if self._config.keep_every is not None:
                kept |= {old for old in self.steps() if old % self._config.keep_every == 0}
            for old in self.steps():
                if old not in kept:
                    self._remove(old)
            remove_unused_folders(self._folder)

    def _remove(self, old: int) -> None:
        """Removes a checkpoint. One that stays costs room and no more, so it ends no run."""
        folder = self._folder / str(old)
        try:
            if in_bucket(folder):
                (folder / files.COMMIT).unlink()
            else:
                folder = folder.rename(self._folder / f"{old}.deleted")
            remove_folder(folder)
        except OSError as error:
            logger.warning(
                "Checkpoint %d is no longer needed, but cannot be removed: %s", old, error
            )

    def _tidy(self) -> None:
        """Before the first save: removes what a killed run left, sets aside what the restored step
        has passed over.
        """
        if jax.process_index() == 0 and self._folder.is_dir():
            if not self._tidied:
                for path in self._unfinished():
                    remove_folder(path)
            for step in sorted(self._passed_over):
                aside = self._folder / f"{step}.set-aside"
                remove_folder(aside)
                (self._folder / str(step)).rename(aside)
                logger.warning(
                    "Checkpoint %d was passed over at restore; it is now %s.", step, aside
                )
        self._passed_over = set()
        self._tidied = True

    def _unfinished(self, step: str = "*") -> list[Path]:
        """Returns what a write or a removal that was cut short has left, of one step or of all."""
        names = (f"{step}.orbax-checkpoint-tmp*", f"{step}.deleted", "base-*.orbax-checkpoint-tmp*")
        found = [path for name in names for path in self._folder.glob(name)]
        if in_bucket(self._folder) and self._folder.is_dir():
            named = [path for path in self._folder.glob(step) if path.name.isdecimal()]
            found += [path for path in named if not files.is_complete(path)]
        return found

    def _fail(self, error: Exception) -> None:
        """Notes that a write has failed. The error's frames let go of the tasks that wrote other
        arrays.
        """
        self._failed = True
        for each in _chain(error):
            traceback.clear_frames(each.__traceback__)

    def _explain(self, step: int, error: Exception) -> None:
        """Raises what `error` means to the user, and leaves nothing half-written."""
        self._fail(error)
        if jax.process_index() == 0:
            for path in self._unfinished(str(step)):
                with contextlib.suppress(OSError):
                    remove_folder(path)
            remove_unused_folders(self._folder)
        self._check_workdir(step)
        folder = self._folder / str(step)
        said = " ".join(map(str, _chain(error)))
        for fault in DISK_FAULTS:
            if fault in said:
                before = (
                    "Earlier checkpoints are whole"
                    if self.steps()
                    else "There is no earlier checkpoint"
                )
                raise UserError(f"{folder}: {fault}; it was not written. {before}.") from error
        raise error

    def _check_workdir(self, step: int) -> None:
        """Raises UserError where the workdir was deleted, and leaves nothing there of the write of
        a step.
        """
        self._remove_made_again(step)
        self._presence.check()

    def _remove_made_again(self, step: int) -> None:
        """Where the workdir was deleted: removes what the write of a step has made there anew."""
        if jax.process_index() != 0 or not self._presence.is_gone():
            return
        for path in (
            *self._unfinished(str(step)),
            self._folder / str(step),
            *files.shared_folders(self._folder),
        ):
            with contextlib.suppress(OSError):
                remove_folder(path)
        if not in_bucket(self._folder):
            with contextlib.suppress(
                OSError
            ):  # they are missing, or hold what somebody else has put there
                self._folder.rmdir()
                self._folder.parent.rmdir()


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and what it was raised from, each once: errors may name each other."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _shapes(tree: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(
            leaf.shape,
            leaf.dtype,
            sharding=leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0]),
        )
        for name, leaf in named_leaves(tree).items()
    }


def _rebuild(like: Any, named: Mapping[str, jax.Array]) -> Any:
    return jax.tree.unflatten(jax.tree.structure(like), list(named.values()))

"""The folder of a run's checkpoints: which steps have one, and what else is in it.

    <step>                          a checkpoint
    <step>.orbax-checkpoint-tmp…    Orbax writes into it, and renames it when all is in it
    <step>.deleted                  an old checkpoint, renamed before its files are removed
    <step>.set-aside                a damaged one that was newer than the one restored
    base-<digest>                   frozen parameters that checkpoints share (checkpoint_frozen.py)

In a bucket, where no folder can be renamed atomically, a folder is a checkpoint when
`commit_success.txt` is in it: Orbax writes that file last, and it is removed first.
"""

import contextlib
import logging
from collections.abc import Collection

from research.storage.files import remove_folder
from research.storage.paths import Path, absolute, in_bucket
from research.training import checkpoint_files as files
from research.training.presence import Presence

logger = logging.getLogger("tessera")

LAST_STEP = 2**31 - 1  # steps are counted in 32 bits


class CheckpointFolder:
    """The checkpoints of one workdir by their steps, whatever their content.

    Where several processes share the folder, process 0 alone calls what removes or renames.

    Args:
      workdir: whose they are.
    """

    def __init__(self, workdir: Path):
        self.path = absolute(workdir) / "checkpoints"
        self._presence = Presence(self.path.parent, "config.json")
        self._warned_of: set[str] = set()  # names that look like steps and are none

    def of_step(self, step: int) -> Path:
        """Returns the folder of a step's checkpoint."""
        return self.path / str(step)

    def steps(self) -> list[int]:
        """Returns the steps that have a checkpoint, intact or damaged, oldest first."""
        if not self.path.is_dir():
            return []
        steps = []
        for path in sorted(self.path.iterdir()):
            if not path.name.isdecimal():
                continue
            if in_bucket(path) and not files.is_complete(path):
                continue  # it is being written
            if _is_step(path.name):
                steps.append(int(path.name))
            elif path.name not in self._warned_of:
                self._warned_of.add(path.name)
                logger.warning("%s is ignored: no step has this name.", path)
        return sorted(steps)

    def remove(self, step: int) -> None:
        """Removes a checkpoint. One that cannot be removed only takes disk space: this is logged,
        and the run goes on.
        """
        folder = self.of_step(step)
        try:
            # From here on it is no checkpoint, also where the removal is cut short.
            if in_bucket(folder):
                (folder / files.COMMIT).unlink()
            else:
                folder = folder.rename(self.path / f"{step}.deleted")
            remove_folder(folder)
        except OSError as error:
            logger.warning(
                "Checkpoint %d is no longer needed, but cannot be removed: %s", step, error
            )

    def set_aside(self, steps: Collection[int]) -> None:
        """Renames the damaged checkpoints that restoring has skipped."""
        for step in sorted(steps):
            aside = self.path / f"{step}.set-aside"
            remove_folder(aside)
            self.of_step(step).rename(aside)
            logger.warning("Checkpoint %d was skipped at restore; it is now %s.", step, aside)

    def remove_unfinished(self) -> None:
        """Removes what killed runs have left of writes and removals."""
        for path in self._unfinished("*"):
            remove_folder(path)

    def remove_failed(self, step: int) -> None:
        """Removes what a failed write of a step has left, as far as that is possible."""
        for path in self._unfinished(str(step)):
            with contextlib.suppress(OSError):
                remove_folder(path)

    def check_workdir(self) -> None:
        """Raises UserError where the workdir was deleted while the run trained."""
        self._presence.check()

    def remove_recreated(self, step: int) -> None:
        """Where the workdir was deleted: removes what the write of a step has made there since."""
        if not self._presence.is_gone():
            return
        recreated = [
            *self._unfinished(str(step)),
            self.of_step(step),
            *files.shared_folders(self.path),
        ]
        for path in recreated:
            with contextlib.suppress(OSError):
                remove_folder(path)
        if in_bucket(self.path):
            return
        # It raises where they are missing, or where somebody else has written into them.
        with contextlib.suppress(OSError):
            self.path.rmdir()
            self.path.parent.rmdir()

    def _unfinished(self, step: str) -> list[Path]:
        """Returns what an interrupted write or removal of a step has left; `*` is all steps."""
        patterns = (
            f"{step}.orbax-checkpoint-tmp*",
            f"{step}.deleted",
            "base-*.orbax-checkpoint-tmp*",
        )
        found = [path for pattern in patterns for path in self.path.glob(pattern)]
        if in_bucket(self.path) and self.path.is_dir():
            named = [path for path in self.path.glob(step) if path.name.isdecimal()]
            found += [path for path in named if not files.is_complete(path)]
        return found


def _is_step(name: str) -> bool:
    """Whether decimal digits are the name of a step: no leading zeros, and not too large."""
    # The length first: int() of thousands of digits is an error.
    return len(name) <= len(str(LAST_STEP)) and name == str(int(name)) and int(name) <= LAST_STEP

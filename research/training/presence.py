"""Notices that a workdir is deleted while a run trains in it.

An open file can be written after its name is removed, and Orbax and TensorStore recreate missing
folders. Without this check a run would write into a deleted file, or into a new folder that has
only a part of the old one.
"""

from research.core.errors import UserError
from research.storage.paths import Path


class Presence:
    """Watches one file of a workdir, whose absence means that the workdir was deleted.

    Args:
      workdir: the run's folder.
      name: the file. Before it has existed once, it cannot be deleted.
    """

    def __init__(self, workdir: Path, name: str):
        self._workdir = workdir
        self._name = name
        self._seen = False
        self.is_gone()

    def is_gone(self) -> bool:
        """Returns whether the file does not exist, but did at an earlier check."""
        exists = (self._workdir / self._name).exists()
        # Before the first row of a new run there is no file, which is no deletion.
        self._seen = self._seen or exists
        return self._seen and not exists

    def check(self) -> None:
        """Raises UserError where the file is gone."""
        if self.is_gone():
            raise UserError(
                "workdir",
                self._workdir,
                f"was deleted while the run trained ({self._name} is gone): nothing more is "
                "written there.",
            )

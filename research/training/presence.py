"""Notices that a workdir is deleted while a run trains in it.

An open file can be written when its name is gone, and Orbax and TensorStore make missing folders
anew. Without a look at a file that was there before, a run would write on into nothing, or into a
new folder with a part of the old one.
"""

from research.core.errors import UserError
from research.storage.paths import Path


class Presence:
    """Watches one file of a workdir, which stands for the whole of it.

    Args:
      workdir: the run's folder.
      name: the file. Until it has been there once, nothing is missed.
    """

    def __init__(self, workdir: Path, name: str):
        self._workdir, self._name = workdir, name
        self._seen = False
        self.is_gone()

    def is_gone(self) -> bool:
        """Looks whether the file is there, and returns whether it was there before and no longer
        is.
        """
        is_there = (self._workdir / self._name).exists()
        self._seen = self._seen or is_there
        return self._seen and not is_there

    def check(self) -> None:
        """Raises UserError where the file is gone."""
        if self.is_gone():
            raise UserError(
                "workdir",
                self._workdir,
                f"was deleted while the run trained ({self._name} is gone): nothing more is "
                "written there.",
            )

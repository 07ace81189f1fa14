"""The lock of a workdir: one run at a time writes there."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator

import jax

from research.core.errors import UserError
from research.storage import files
from research.storage.paths import Path, in_bucket

logger = logging.getLogger("tessera")

_NAME = ".lock"


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Locks a checked workdir for this run as long as the context lasts. A workdir that did not
    exist is removed at the end if nothing was written there: the run did not start.

    Raises:
      UserError: another run has the lock.
    """
    if jax.process_index() != 0:
        yield
        return
    if in_bucket(workdir):
        logger.warning("%s: a bucket has no locks: nothing keeps a second run out", workdir)
        yield
        return
    is_new = not workdir.exists()
    files.make_folder(workdir)
    with _locked(workdir):
        try:
            yield
        finally:
            if is_new:
                _remove_unused(workdir)


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """Holds the lock of the workdir's `.lock`, which the system releases when the process dies. The
    file itself stays.
    """
    with (workdir / _NAME).open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                "workdir", workdir, f"is in use: process {file.read()} trains there."
            ) from error
        except OSError as error:
            # Some network file systems have no locks.
            logger.warning("%s: %s: nothing keeps a second run out", file.name, error.strerror)

        # The process id, for the error of the next run.
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _remove_unused(workdir: Path) -> None:
    """Removes a workdir that has the lock alone; one that somebody deleted meanwhile is no
    error.
    """
    with contextlib.suppress(OSError):
        if [path.name for path in workdir.iterdir()] == [_NAME]:
            (workdir / _NAME).unlink()
            workdir.rmdir()

"""The lock of a workdir: one run at a time writes there."""

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator

import jax

from research.core.errors import UserError
from research.data.tokenizers import Tokenizer
from research.recipes.experiment import ExperimentConfig
from research.recipes.workdir import write_config
from research.storage import files
from research.storage.paths import Path, in_bucket

logger = logging.getLogger("tessera")


@contextlib.contextmanager
def lock(workdir: Path, config: ExperimentConfig, tokenizer: Tokenizer) -> Iterator[None]:
    """Locks a checked workdir for this run as long as the context lasts, and writes its config and
    tokenizer there.

    Enter it once nothing else can be a user's mistake.

    Raises:
      UserError: another run has the lock.
    """
    if jax.process_index() != 0:
        yield
        return
    files.make_folder(workdir)
    with _locked(workdir):
        write_config(workdir, config)
        tokenizer.save(workdir / "tokenizer")
        yield


@contextlib.contextmanager
def _locked(workdir: Path) -> Iterator[None]:
    """Holds the lock of the workdir's `.lock`, which the system releases when the process dies. The
    file itself stays.
    """
    if in_bucket(workdir):
        logger.warning("%s: a bucket has no locks: nothing keeps a second run out", workdir)
        yield
        return
    with (workdir / ".lock").open("a+") as file:
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

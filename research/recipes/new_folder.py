"""A folder that is written whole or not at all."""

import contextlib
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from research.core.errors import UserError


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a folder beside `target` that takes its name when all is written, and vanishes when not.

    Raises:
      UserError: `target` is there already and not empty, or cannot be made.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"--to = {target} exists already and is not an empty folder.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"--to = {target} cannot be made: {error.strerror}.") from error
    try:
        # mkdtemp's folders are their owner's alone; a workdir is like any other folder.
        folder.chmod(0o755)
        yield folder
        folder.replace(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise

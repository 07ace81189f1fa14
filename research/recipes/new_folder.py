"""The folder that a verb makes for its user."""

import contextlib
import pathlib
from collections.abc import Iterator

from research.core.errors import UserError
from research.storage import files


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
        files.check_writable(target.parent)
    except OSError as error:
        raise UserError(f"--to = {target} cannot be made: {error.strerror}.") from error
    with files.new_folder(target) as folder:
        yield folder

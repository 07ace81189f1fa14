"""The folder that a verb makes for its user."""

import contextlib
import pathlib
from collections.abc import Iterator

from research.core.errors import UserError
from research.storage import files
from research.storage.paths import Path, reason


@contextlib.contextmanager
def new_folder(target: Path, last: str) -> Iterator[pathlib.Path]:
    """Yields a local folder that becomes `target` when all is written, and vanishes when not.

    Args:
      target: a local folder, or one in a bucket.
      last: the file without which nobody takes the folder for what it is; it is uploaded last.

    Raises:
      UserError: `target` is there already and not empty, or cannot be made.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError("target", target, "exists already and is not an empty folder.")
    try:
        files.make_folder(target.parent)
        files.check_writable(target.parent)
    except OSError as error:
        raise UserError("target", target, f"cannot be made: {reason(error)}.") from error
    with files.new_folder(target, last=last) as folder:
        yield folder

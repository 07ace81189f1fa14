"""The output folder of a verb: written whole or not at all."""

import contextlib
import pathlib
from collections.abc import Iterator

from research.core.errors import UserError
from research.storage import files
from research.storage.paths import Path, reason


@contextlib.contextmanager
def new_folder(target: Path, last: str) -> Iterator[pathlib.Path]:
    """Yields a local folder that becomes `target` when all is written, and is removed when not.

    Args:
      target: a local folder, or one in a bucket.
      last: the file that marks the folder as complete; it is uploaded last.

    Raises:
      UserError: `target` is there already and not empty, or cannot be made.
    """
    if target.exists():
        is_empty_folder = target.is_dir() and not any(target.iterdir())
        if not is_empty_folder:
            raise UserError("target", target, "exists already and is not an empty folder.")

    # A folder that cannot be made is an error before the work begins.
    try:
        files.make_folder(target.parent)
        files.check_writable(target.parent)
    except OSError as error:
        raise UserError("target", target, f"cannot be made: {reason(error)}.") from error
    with files.new_folder(target, last=last) as folder:
        yield folder

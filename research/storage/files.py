"""Files and folders that are written whole or not at all.

A file is written beside its place and renamed; a folder is made under a name that ends in `PARTIAL` and renamed when
all is in it. Whoever is killed meanwhile leaves such a folder; whoever makes the next one there removes it.
"""

import contextlib
import fcntl
import logging
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

logger = logging.getLogger("tessera")

# How the name of a folder ends in which something is still written.
PARTIAL = ".tessera-partial"


def write_bytes(path: pathlib.Path, data: bytes) -> None:
    """Writes a file, at once: whoever reads it, also after a crash, finds the old content or the new one."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a file of UTF-8 text as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


@contextlib.contextmanager
def new_folder(final: pathlib.Path, keep_existing: bool = False) -> Iterator[pathlib.Path]:
    """Yields a folder beside `final` that takes its name when the context ends, and vanishes where it raises.

    Args:
      final: must not be there, or be an empty folder.
      keep_existing: whether a folder of this name that somebody else has made meanwhile is kept, and this one given up.

    Raises:
      OSError: a folder that cannot be made or renamed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(final.parent)
    partial, lock = _make_partial(final)
    try:
        yield partial
        try:
            partial.rename(final)
        except OSError:
            if not (keep_existing and final.is_dir()):
                raise
    finally:
        # After the renaming there is nothing under this name.
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def remove_leftovers(parent: pathlib.Path, pattern: str = f".*{PARTIAL}") -> None:
    """Removes the folders in `parent` that killed processes left; one that a living process fills is locked.

    Args:
      parent: may be missing.
      pattern: what their names match.
    """
    for folder in parent.glob(pattern):
        lock = _lock(folder)
        if lock is None:
            continue
        logger.info("%s: removed, an earlier run was stopped while it wrote it", folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def check_writable(folder: pathlib.Path) -> None:
    """Raises OSError where a file cannot be made in a folder, or in the nearest one above that exists."""
    above = (folder.absolute(), *folder.absolute().parents)
    with tempfile.NamedTemporaryFile(dir=next(path for path in above if path.exists())):
        pass


def _make_partial(final: pathlib.Path) -> tuple[pathlib.Path, int]:
    """Returns a new locked folder beside `final` and its lock."""
    while True:
        partial = pathlib.Path(tempfile.mkdtemp(prefix=f".{final.name}.", suffix=PARTIAL, dir=final.parent))
        # mkdtemp's folders are their owner's alone; what is made here is like any other folder.
        partial.chmod(0o755)
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:  # taken for a leftover before it was locked
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # the same
            os.close(lock)
            continue
        except OSError:  # a file system without locks, where nobody removes leftovers either
            pass
        return partial, lock


def _lock(folder: pathlib.Path) -> int | None:
    """Returns the lock of a folder, or None where somebody holds it or nobody can."""
    try:
        lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    return lock

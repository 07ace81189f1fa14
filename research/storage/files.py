"""Files and folders that are written atomically.

A file is written beside its final path, under a name that ends in `UNFINISHED`, and renamed; a
folder is filled under a name that ends in `PARTIAL`, and renamed when all is in it. A process that
is killed meanwhile leaves such a file or folder; the next one that writes that file, or makes a
folder there, removes it.

In a bucket each file is written atomically already. A folder is filled on this machine and
uploaded, `last` at the end: without that file no reader takes the folder for a complete one.
"""

import contextlib
import errno
import fcntl
import glob
import logging
import os
import pathlib
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator

from research.storage.paths import Path, bucket_of, in_bucket, reason

logger = logging.getLogger("tessera")

# Suffix of a folder that is still being filled: `.NAME.RANDOM.tessera-partial`.
PARTIAL = ".tessera-partial"
# Suffix of a file that is still being written: `NAME.RANDOM.tmp`.
UNFINISHED = ".tmp"
# Such a folder in the cache, as older versions named it: `.KIND-DIGEST-RANDOM`.
_OLDER_PARTIAL = re.compile(r"\.[a-z0-9_]+-[0-9a-f]{16}-[a-z0-9_]{6,8}")
# Bytes of a file that are sent to a bucket at a time.
COPY_BYTES = 2**23


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file atomically: a reader finds the old content or the new, also after a crash.

    Unfinished files that killed writers left beside it are removed.
    """
    if in_bucket(path):
        path.write_bytes(data)
        return
    _remove_unfinished(path)
    # Each writer has a temporary file of its own, so that two of them do not mix their content.
    temporary, lock = _make_locked(path, "", UNFINISHED, pathlib.Path.touch, pathlib.Path.unlink)
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            # The data before the name: a power failure must not leave an empty file of this name.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    finally:
        os.close(lock)
    _fsync_directory(path.parent)


def write_text(path: Path, text: str) -> None:
    """Writes a file of UTF-8 text as `write_bytes` does."""
    write_bytes(path, text.encode("utf-8"))


def append_text(path: Path, text: str) -> None:
    """Appends text to a file, which may not exist; in a bucket the complete file is rewritten."""
    if not in_bucket(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
        return
    # Objects cannot be appended to.
    before = path.read_bytes() if path.exists() else b""
    path.write_bytes(before + text.encode("utf-8"))


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents where they are missing; in a bucket there are no folders."""
    if not in_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove_folder(folder: Path) -> None:
    """Removes a folder with all that is in it, or a link to one, if it exists."""
    if in_bucket(folder):
        folder.rmtree(missing_ok=True)
    elif folder.is_symlink():
        folder.unlink()
    elif folder.is_dir():
        shutil.rmtree(folder)


def upload(source: pathlib.Path, target: Path, last: str = "") -> None:
    """Copies the files of a local folder into a bucket's.

    Args:
      source: the local folder.
      target: the folder in the bucket.
      last: the name of the file in `source` that comes after all others.
    """
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    # False sorts before True: all others, then `last`.
    for path in sorted(paths, key=lambda path: path == source / last):
        copy_path = target / path.relative_to(source).as_posix()
        with path.open("rb") as file, copy_path.open("wb") as copy:
            shutil.copyfileobj(file, copy, COPY_BYTES)


@contextlib.contextmanager
def new_folder(final: Path, keep_existing: bool = False, last: str = "") -> Iterator[pathlib.Path]:
    """Yields a local folder that becomes `final` when the context ends, or is removed if it raises.

    Args:
      final: must not exist, or be an empty folder.
      keep_existing: whether a folder of this name that another process has made meanwhile is kept,
          and this one removed.
      last: the file that is uploaded last where `final` is in a bucket.

    Raises:
      OSError: a folder that cannot be made or renamed.
    """
    if in_bucket(final):
        with tempfile.TemporaryDirectory(prefix="tessera-") as local:
            yield pathlib.Path(local)
            try:
                upload(pathlib.Path(local), final, last)
            except BaseException:
                final.rmtree(missing_ok=True)
                raise
        return
    final.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(final.parent)
    partial, lock = _make_locked(final, ".", PARTIAL, pathlib.Path.mkdir, pathlib.Path.rmdir)
    try:
        yield partial
        try:
            partial.rename(final)
        except OSError:
            # Another process was quicker: its folder has the same content.
            if not (keep_existing and final.is_dir()):
                raise
        _fsync_directory(final.parent)
    finally:
        # After the renaming there is nothing under this name.
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


def remove_leftovers(parent: pathlib.Path, older: bool = False) -> None:
    """Removes the folders in `parent` that killed processes left.

    A folder that a running process fills is locked, and stays.

    Args:
      parent: may be missing.
      older: whether those of older versions are removed too. Their names are less distinctive, so
          that this is safe in the cache alone.
    """
    for folder in parent.glob(".*"):
        is_ours = folder.name.endswith(PARTIAL) or (older and _OLDER_PARTIAL.fullmatch(folder.name))
        if not is_ours:
            continue
        # The lock of a process ends with it: a folder that can be locked has no writer.
        lock = _lock(folder, os.O_DIRECTORY)
        if lock is None:
            continue
        logger.info("%s: removed, an earlier run was stopped while it wrote it", folder)
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _remove_unfinished(path: pathlib.Path) -> None:
    """Removes unfinished files of killed writers of a file; those of running ones are locked."""
    # config.json -> config.json.1f0a99c3.tmp and the like
    random = 8 * "[0-9a-f]"
    for left in path.parent.glob(f"{glob.escape(path.name)}.{random}{UNFINISHED}"):
        # Opening a pipe of this name would wait for its writer.
        lock = _lock(left, os.O_NONBLOCK)
        if lock is None:
            continue
        with contextlib.suppress(OSError):
            left.unlink(missing_ok=True)
        os.close(lock)


def check_writable(folder: Path) -> None:
    """Raises OSError where a file cannot be made in a folder, or in the nearest one above that
    exists.
    """
    if in_bucket(folder):
        _check_bucket_writable(folder)
        return
    folder = folder.absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    with tempfile.NamedTemporaryFile(dir=nearest):
        pass


def _check_bucket_writable(folder: Path) -> None:
    bucket = bucket_of(folder)
    try:
        if not bucket.exists():
            raise OSError(errno.ENOENT, f"there is no bucket {bucket}, or it may not be looked at")
        # Whether objects may be written shows only when one is.
        probe = folder / ".tessera-probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError:
        raise
    except Exception as error:  # the client raises errors of many types
        raise OSError(errno.EIO, reason(error)) from error


def _fsync_directory(folder: pathlib.Path) -> None:
    """Writes the names in a folder to the disk, so that a rename survives a power failure."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder that may be written but not read
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        # File systems that do so by themselves, or never.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _make_locked(
    final: pathlib.Path,
    prefix: str,
    suffix: str,
    make: Callable[[pathlib.Path], None],
    remove: Callable[[pathlib.Path], None],
) -> tuple[pathlib.Path, int]:
    """Returns a new locked file or folder beside `final`, and its lock.

    Args:
      final: the path that it will get.
      prefix: of its name, before that of `final`.
      suffix: of its name, after that and eight random digits.
      make: makes it empty, with the usual permissions, which `tempfile` does not give.
      remove: removes it while it is empty.
    """
    while True:
        partial = final.with_name(f"{prefix}{final.name}.{uuid.uuid4().hex[:8]}{suffix}")
        make(partial)
        # Until it is locked, another process may take it for a leftover: it then has removed it, or
        # holds its lock in order to. In each case the next name is tried.
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue
        except BaseException:
            remove(partial)
            raise
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        except OSError:
            # A file system without locks, where no process removes leftovers either.
            return partial, lock
        if _is_open_as(lock, partial):
            return partial, lock
        # Removed between opening and locking.
        os.close(lock)


def _lock(path: pathlib.Path, flags: int) -> int | None:
    """Returns the lock of a file or folder, or None where it cannot be locked.

    Args:
      path: of the file or folder.
      flags: of `os.open`, beside O_RDONLY.
    """
    try:
        lock = os.open(path, os.O_RDONLY | flags)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        return None
    if _is_open_as(lock, path):
        return lock
    # Its writer has renamed it meanwhile.
    os.close(lock)
    return None


def _is_open_as(descriptor: int, path: pathlib.Path) -> bool:
    """Whether a path still names the file or folder that a descriptor has open."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False

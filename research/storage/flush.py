"""Flushing of large files while they are written, and their pages dropped from the page cache."""

import mmap
import os
import pathlib
from collections.abc import Callable

from research.storage.background import BackgroundWorker

# Bytes between two flushes of what was written.
STRIDE = 2**26


def flush(descriptor: int) -> None:
    """Waits until the data of a file is on the disk, and drops its pages from the page cache.

    By default the system keeps as many pages of a file as fit into memory, allocates new ones for
    new data, which may cost more than writing it, and writes them at the end, when the caller
    waits.
    """
    os.fdatasync(descriptor)
    if hasattr(os, "posix_fadvise"):  # not on every system, and only advice
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def supports_direct_io(path: pathlib.Path) -> bool:
    """Whether files in this file's folder can be read past the page cache.

    Allocating new pages there may cost more than reading the data.
    """
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            # Direct I/O needs aligned memory, such as a page.
            with mmap.mmap(-1, mmap.PAGESIZE) as page:
                os.preadv(descriptor, [page], 0)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True


class BackgroundFlusher:
    """Flushes files in a thread while more is written; leaving the context waits for it.

    Args:
      flush: called whenever `STRIDE` bytes were written; the next call raises what it raises.
    """

    def __init__(self, flush: Callable[[], None]):
        self._flush = flush
        self._worker = BackgroundWorker()
        self._unflushed = 0

    def wrote(self, size: int) -> None:
        """Counts bytes that were written; waits where the disk is behind by two strides."""
        self._unflushed += size
        if self._unflushed >= STRIDE:
            self._worker.call(self._flush)
            self._unflushed = 0

    def __enter__(self) -> "BackgroundFlusher":
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        self._worker.close()
        if kind is None:
            self._worker.wait()

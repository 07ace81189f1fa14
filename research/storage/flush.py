"""Large files that reach the disk while they are written, and leave memory as soon as they are
there.
"""

import mmap
import os
import pathlib
from collections.abc import Callable

from research.storage.background import BackgroundWorker

# Bytes between two flushes of what was written.
STRIDE = 2**26


def flush(descriptor: int) -> None:
    """Waits until the data of a file is on the disk, and lets its memory go to what is written
    next.

    Left to itself the system keeps all pages of a file that it has memory for, takes new ones for
    new data, which may cost more than the data, and writes them at the end, when everybody waits.
    """
    os.fdatasync(descriptor)
    if hasattr(os, "posix_fadvise"):  # not on every system; it is but advice
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def supports_direct_io(path: pathlib.Path) -> bool:
    """Whether files beside this one can be read past the page cache, whose new pages cost more than
    the data.
    """
    if not hasattr(os, "O_DIRECT"):
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(
                -1, mmap.PAGESIZE
            ) as page:  # which is aligned as direct reading wants it
                os.preadv(descriptor, [page], 0)
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True


class BackgroundFlusher:
    """Flushes files in a thread while more is written. A context manager, whose end waits for the
    flush under way.

    Args:
      flush: is called each time when enough was written; what it raises is raised by the next call.
    """

    def __init__(self, flush: Callable[[], None]):
        self._flush, self._worker = flush, BackgroundWorker()
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

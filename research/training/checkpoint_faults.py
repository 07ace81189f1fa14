"""What the error of a write means: a fault of the disk that the user can mend, or another error."""

import errno
import os
import traceback
from collections.abc import Iterator

# Faults of a disk that the user can mend. TensorStore's errors have no number, only the system's
# words for it.
DISK_FAULTS = tuple(
    os.strerror(number)
    for number in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
        errno.EIO,
        errno.ESTALE,
    )
)


def disk_fault(error: BaseException) -> str | None:
    """Returns the fault of the disk that an error, or one that it was raised from, reports."""
    messages = " ".join(str(each) for each in _chain(error))
    for fault in DISK_FAULTS:
        if fault in messages:
            return fault
    return None


def release_frames(error: BaseException) -> None:
    """Clears the frames of an error's tracebacks, which keep the tasks of other writes alive."""
    for each in _chain(error):
        traceback.clear_frames(each.__traceback__)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and what it was raised from, each once: errors may name each other."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        # `raise A from B` sets the cause of A; A raised while B is handled has B as its context.
        error = error.__cause__ or error.__context__

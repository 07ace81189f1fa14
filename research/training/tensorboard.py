"""TensorBoard's event files, written without a thread.

tensorboardX's own writer has a thread that computes its waits from the system's clock: when that is
set back by days, the thread dies, and writes wait for it for ever.
"""

import logging
import pathlib
import time
from collections.abc import Callable, Mapping

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog

logger = logging.getLogger("tessera")

SECONDS_BETWEEN_FLUSHES = 30.0


class Board:
    """Appends scalars to a new event file.

    What goes wrong with it is only a warning: metrics.jsonl has the numbers too.

    Args:
      folder: of the event files.
      resumed_step: TensorBoard hides what earlier files hold of later steps.
    """

    def __init__(self, folder: pathlib.Path, resumed_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # Files are named by the second; two runs within one would otherwise share a file.
        self._writer = EventsWriter(str(folder / "events"), f".from-{resumed_step}")
        self._flushed = time.monotonic()
        self._failed = False

        # START makes TensorBoard hide what earlier files have from this step on.
        first_step = resumed_step + 1
        start = SessionLog(status=SessionLog.START)
        self._add(Event(step=first_step, file_version="brain.Event:2"))
        self._add(Event(step=first_step, session_log=start))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds the numbers of a step."""
        for name, value in values.items():
            self._add(Event(step=step, summary=summary.scalar(name, value)))
        if time.monotonic() - self._flushed >= SECONDS_BETWEEN_FLUSHES:
            self._flushed = time.monotonic()
            self._safely(self._writer.flush)

    def flush(self) -> None:
        """Writes out what is not in the file yet."""
        self._safely(self._writer.flush)

    def close(self) -> None:
        """Writes out what is not in the file yet, and closes it."""
        self._safely(self._writer.close)

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        self._safely(lambda: self._writer.write_event(event))

    def _safely(self, act: Callable[[], object]) -> None:
        """Acts, unless that has failed before; a failure is a warning."""
        if self._failed:
            return
        try:
            act()
        except OSError as error:
            self._failed = True
            logger.warning("TensorBoard gets no more numbers: %s", error)

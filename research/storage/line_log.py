"""A file of JSON lines that is appended to, by runs that may be killed at any moment."""

import fcntl
import json
import logging
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from research.core.differences import first_difference
from research.core.errors import UserError
from research.storage import files
from research.storage.json_files import read_object
from research.storage.paths import reason

logger = logging.getLogger("tessera")

# Beside the file: what its lines are of.
SOURCE = ".source.json"


class LineLog:
    """Lines that are in the file whole or not at all: what a killed run has half written is dropped
    when the next one opens it. A context manager.

    Args:
      path: of the file, which may not exist.
      source: what the lines are of, as JSON; a file of something else is refused.

    Raises:
      UserError: the file is of something else, is no such file, or another process writes it.
    """

    def __init__(self, path: pathlib.Path, source: Mapping[str, Any]):
        self._path = path
        if path.exists() and not path.is_file():
            raise UserError("out", path, "must be a file: lines are read from it and added to it.")
        try:
            self._file = path.open("a+b")
        except OSError as error:
            raise UserError("out", path, f"cannot be written: {reason(error)}.") from error
        try:
            self._lock()
            self._check_source(source)
            self._drop_torn_line()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "LineLog":
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        try:
            self._file.close()
        except OSError:
            # What could not be written was said already.
            if kind is None:
                raise

    def values(self) -> Iterator[dict[str, Any]]:
        """Yields the objects that the file has.

        Raises:
          UserError: a line that is no JSON object.
        """
        self._file.seek(0)
        for number, line in enumerate(self._file, 1):
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                raise UserError("out", self._path, f": line {number} is no JSON object.")
            yield value

    def append(self, value: Mapping[str, Any]) -> None:
        """Adds a line.

        Raises:
          UserError: the disk does not take it.
        """
        line = json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"
        try:
            # One call for all of it: nothing of it stays in a buffer that dies with the process.
            self._file.write(line.encode("utf-8"))
            self._file.flush()
        except OSError as error:
            raise UserError("out", self._path, f"cannot be written: {reason(error)}.") from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError("out", self._path, "is being written by another process.") from error
        except OSError as error:
            # Some network file systems have no locks.
            logger.warning("%s: %s: nothing keeps a second run out", self._path, error.strerror)

    def _check_source(self, source: Mapping[str, Any]) -> None:
        path = self._path.with_name(self._path.name + SOURCE)
        if os.fstat(self._file.fileno()).st_size == 0:
            files.write_text(path, json.dumps(source) + "\n")
            return
        if not path.exists():
            raise UserError(
                "out", self._path, f"holds something else: there is no {path.name} beside it."
            )
        stored = read_object(path)
        # As JSON has it: a tuple is a list there.
        difference = first_difference(stored, json.loads(json.dumps(source)))
        if difference is not None:
            raise UserError(
                "out",
                self._path,
                f"holds answers to something else: {difference} differs. Use another file, or "
                "delete this one.",
            )

    def _drop_torn_line(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        whole = size
        # Back to the end of the last whole line, a block at a time.
        while whole > 0:
            start = max(whole - 2**16, 0)
            self._file.seek(start)
            block = self._file.read(whole - start)
            end = block.rfind(b"\n")
            if end >= 0:
                whole = start + end + 1
                break
            whole = start
        if whole < size:
            logger.info("%s: dropped the last line, which was not whole", self._path)
            self._file.truncate(whole)

"""The figures of a bench as a file."""

import json
from typing import Any

from research.core.errors import UserError
from research.storage import files
from research.storage.paths import as_path, reason


def write_report(place: str | None, report: Any) -> None:
    """Writes what a bench measured as JSON, whole or not at all; without a place it does nothing.

    Args:
      place: the file, local or in a bucket.
      report: numbers and texts in dicts and lists.

    Raises:
      UserError: a file that cannot be written.
    """
    if not place:
        return
    try:
        files.write_text(as_path(place, "json"), json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise UserError("json", place, f"cannot be written: {reason(error)}.") from error

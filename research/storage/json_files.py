"""Reading JSON files that other programs or people may have written."""

import json
from typing import Any

from research.core.errors import UserError
from research.storage.paths import Path


def read_json(path: Path) -> Any:
    """Returns the value in a file; raises UserError where it cannot be read or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises UserError where there is none."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object.")
    return values

"""Where two plain configs differ."""

from typing import Any

from research.core.errors import join


def first_difference(a: Any, b: Any, where: str = "") -> str | None:
    """Returns the dotted name of the first field in which two plain configs differ, or None."""
    if isinstance(a, dict) and isinstance(b, dict):
        only_in_b = [key for key in b if key not in a]
        for key in [*a, *only_in_b]:
            if key not in a or key not in b:
                return join(where, key)
            found = first_difference(a[key], b[key], join(where, key))
            if found is not None:
                return found
        return None
    return None if a == b else where

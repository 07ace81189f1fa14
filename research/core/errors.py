"""What goes wrong, and whose move it is."""

import difflib
from collections.abc import Iterable
from typing import Any

# Names that are known and shown: all that this project has of a kind, but not all that a foreign file may have.
KNOWN_SHOWN = 50


class UserError(ValueError):
    """A mistake that the user can mend.

    The message is one line that names the field (or file), its value and the constraint. The command line prints it
    without a traceback and exits with status 2. Broken invariants of the code itself are `assert`s instead.
    """


class Interrupted(Exception):
    """A run was asked to stop, and its state is saved: the same command goes on with it.

    The command line exits with `status`, EX_TEMPFAIL of sysexits.h, so that a scheduler can tell it from a failure.
    """

    status = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns advice for an unknown `name`: the nearest known one, or all of them where none is near."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {close[0]!r}?"
    return f"Known: {listed(known, limit=KNOWN_SHOWN)}."


def listed(items: Iterable[str], separator: str = ", ", limit: int = 10) -> str:
    """Returns items as one line; of more than `limit` the first ones, and how many there are."""
    items = list(items)
    if len(items) <= limit:
        return separator.join(items)
    return f"{separator.join(items[:limit])}{separator}… ({len(items):,} in all)"


def shown(value: Any, limit: int = 100) -> str:
    """Returns the `repr` of a value of somebody else's file, cut after `limit` letters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} letters)"

"""What goes wrong, and whose move it is."""

import contextlib
import difflib
import enum
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Names that are known and shown: all that this project has of a kind, but not all that a foreign
# file may have.
KNOWN_SHOWN = 50
LONGEST_VALUE = 300  # letters


class Missing(enum.Enum):
    """The value of an error that is about no value."""

    VALUE = enum.auto()


class UserError(ValueError):
    """A mistake that the user can mend: `UserError(field, value, constraint)`, or a message that is
    about no field.

    Its text is one line, `field = value constraint`. A constraint that begins with a colon follows
    at once, and without a value the text is `field constraint`. An origin stands in front with a
    colon, or without one where the message begins with "is ". The command line prints it without a
    traceback and exits with status 2. Broken invariants of the code itself are `assert`s instead.

    Attributes:
      field: dotted path of the config field, or name of the Python argument; empty where the
          message is about none.
      value: what it is, or `Missing.VALUE`.
      constraint: what it must be instead, or the whole message.
      origin: the file or folder in which the field was found; empty where it was given in Python.
    """

    def __init__(
        self, field: str, value: Any = Missing.VALUE, constraint: str = "", origin: str = ""
    ):
        super().__init__(field, value, constraint, origin)  # so that it can be pickled
        about_none = value is Missing.VALUE and not constraint
        self.field = "" if about_none else field
        self.value = value
        self.constraint = field if about_none else constraint
        self.origin = origin

    def __str__(self) -> str:
        return self.text({})

    def text(self, names: Mapping[str, str]) -> str:
        """Returns the message, a field in `names` under that other name, such as a flag."""
        field = {self.field: self.field, **names}[self.field]
        is_missing = self.value is Missing.VALUE
        subject = field if is_missing else f"{field} = {_printed(self.value)}"
        close = not subject or self.constraint.startswith((":", ","))
        said = f"{subject}{self.constraint}" if close else f"{subject} {self.constraint}"
        if not self.origin:
            return said
        is_predicate = not subject and said.startswith("is ")
        return f"{self.origin} {said}" if is_predicate else f"{self.origin}: {said}"

    def about(self, field: str, value: Any) -> "UserError":
        """Returns the error as one about the value of a field; one that names a field of no file
        stays as it is.
        """
        has_field = self.field and not self.origin
        return self if has_field else UserError(field, value, f": {self}")

    def inside(self, group: str, origin: str = "") -> "UserError":
        """Returns the error as it is told from outside: `group` in front of its field, `origin` in
        front of its own.
        """
        origin = ": ".join(part for part in (origin, self.origin) if part)
        if not self.field and not group:
            return UserError(self.constraint, origin=origin)
        if not self.field:
            return UserError(group, constraint=f": {self.constraint}", origin=origin)
        return UserError(join(group, self.field), self.value, self.constraint, origin)


@contextlib.contextmanager
def within(group: str, origin: str = "") -> Iterator[None]:
    """Puts the dotted path of a group in front of the field of a UserError, and the name of a file
    in front of both.
    """
    try:
        yield
    except UserError as error:
        raise error.inside(group, origin) from error


def join(group: str, name: str) -> str:
    """Returns the dotted path of a field of a group, which may be empty."""
    return f"{group}.{name}" if group else name


def _printed(value: Any) -> str:
    """Returns a value as messages show it: strings in quotes, all else as it prints; very long ones
    are cut.
    """
    text = repr(str(value)) if isinstance(value, str) else str(value)
    return (
        text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}… ({len(text):,} letters)"
    )


class Interrupted(BaseException):
    """A run was asked to stop, and its state is saved: the same command goes on with it.

    Like KeyboardInterrupt it is no `Exception`: it may be raised in the middle of any call, and
    code that turns all errors of a library into one of its own must let it pass.

    The command line exits with `status`, EX_TEMPFAIL of sysexits.h, so that a scheduler can tell it
    from a failure.
    """

    status = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns advice for an unknown `name`: the nearest known one, or all of them where none is
    near.
    """
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

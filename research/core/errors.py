"""Errors of users, the request to stop, and texts of messages."""

import contextlib
import difflib
import enum
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

# Known names that a message lists at most: enough for all names that this project has of a kind.
KNOWN_SHOWN = 50
# Characters of a value that a message shows at most.
LONGEST_VALUE = 300


class Missing(enum.Enum):
    """The value of an error without a value."""

    VALUE = enum.auto()


class UserError(ValueError):
    """A mistake that the user can correct: `UserError(field, value, constraint)`, or
    `UserError(message)` without a field.

    Its text is one line, `field = value constraint`, or `field constraint` without a value. There
    is no space before a constraint that begins with a colon or a comma. An origin comes first, with
    a colon after it unless the message begins with "is ". The command line prints the text without
    a traceback and exits with status 2. Broken invariants of the code itself are `assert`s instead.

    Attributes:
      field: dotted path of the config field, or name of the Python argument; empty where there is
          none.
      value: of the field, or `Missing.VALUE`.
      constraint: on the value, or the whole message.
      origin: the file or folder in which the field was found; empty where it was given in Python.
    """

    def __init__(
        self, field: str, value: Any = Missing.VALUE, constraint: str = "", origin: str = ""
    ):
        # Pickle makes the error again from the arguments of `Exception`.
        super().__init__(field, value, constraint, origin)
        is_message_only = value is Missing.VALUE and not constraint
        self.field = field
        self.value = value
        self.constraint = constraint
        self.origin = origin
        if is_message_only:
            self.field = ""
            self.constraint = field

    def __str__(self) -> str:
        return self.text({})

    def text(self, names: Mapping[str, str]) -> str:
        """Returns the message, with the field's other name where `names` has one, such as a
        flag's.
        """
        # mesh.tensor, 3, "must be 1." -> mesh.tensor = 3 must be 1.
        subject = self.field
        if subject in names:
            subject = names[subject]
        if self.value is not Missing.VALUE:
            subject = f"{subject} = {_printed(self.value)}"
        separator = " "
        if not subject or self.constraint.startswith((":", ",")):
            separator = ""
        message = f"{subject}{separator}{self.constraint}"
        if not self.origin:
            return message

        # data.json, "is not a file." -> data.json is not a file.
        is_predicate = not subject and message.startswith("is ")
        separator = " " if is_predicate else ": "
        return f"{self.origin}{separator}{message}"

    def about(self, field: str, value: Any) -> "UserError":
        """Returns an error of this field and value, with this error's text as the constraint; an
        error that has a field already, and no origin, stays as it is.
        """
        if self.field and not self.origin:
            return self
        return UserError(field, value, f": {self}")

    def inside(self, group: str, origin: str = "") -> "UserError":
        """Returns the error with `group` in front of its field, and `origin` in front of its
        own.
        """
        # a.json, b.json -> a.json: b.json
        origins = [part for part in (origin, self.origin) if part]
        origin = ": ".join(origins)
        if self.field:
            field = join(group, self.field)
            return UserError(field, self.value, self.constraint, origin)

        # The message of an error without a field becomes the constraint of the group.
        if group:
            return UserError(group, constraint=f": {self.constraint}", origin=origin)
        return UserError(self.constraint, origin=origin)


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
    return _cut(text, LONGEST_VALUE)


def _cut(text: str, limit: int) -> str:
    """Returns a text, cut after `limit` characters."""
    if len(text) <= limit:
        return text
    return f"{text[:limit]}… ({len(text):,} letters)"


class Interrupted(BaseException):
    """A run was asked to stop, and its state is saved: the same command resumes it.

    Like KeyboardInterrupt it is not an `Exception`: it may be raised in the middle of any call, and
    code that catches all errors of a library must not catch it.

    The command line exits with `status`, EX_TEMPFAIL of sysexits.h, so that a scheduler can
    distinguish it from a failure.
    """

    status = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns advice for an unknown `name`: the most similar known name, or all of them where none
    is similar.
    """
    known = sorted(known)
    match = similar(name, known)
    if match is not None:
        return f"Did you mean {match!r}?"
    return f"Known: {listed(known, limit=KNOWN_SHOWN)}."


def similar(name: str, known: Iterable[str]) -> str | None:
    """Returns the known name that is most similar, or None where none is similar."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def listed(items: Iterable[str], separator: str = ", ", limit: int = 10) -> str:
    """Returns items as one line; of more than `limit` the first ones, and how many there are."""
    items = list(items)
    if len(items) <= limit:
        return separator.join(items)
    # 12 items, limit 2 -> "a, b, … (12 in all)"
    first = separator.join(items[:limit])
    return f"{first}{separator}… ({len(items):,} in all)"


def shown(value: Any, limit: int = 100) -> str:
    """Returns the `repr` of a value of somebody else's file, cut after `limit` characters."""
    return _cut(repr(value), limit)

"""Configs: Python files with `get_config()`, dotted overrides, strict binding to frozen
dataclasses.

A config travels as plain nested dicts until `bind` makes it a dataclass; after that nothing is
looked up by name.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import logging
import math
import pathlib
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import ml_collections

from research.core.errors import UserError, join, nearest, within

C = TypeVar("C")

logger = logging.getLogger("tessera")

_FORMER_NAME = "former_name"


def renamed(former_name: str, **options: Any) -> Any:
    """Returns a dataclass field that `bind` also takes under its former name, with a warning.

    Args:
      former_name: what configs of users and workdirs may still call the field.
      **options: of `dataclasses.field`, such as its default.
    """
    return dataclasses.field(metadata={_FORMER_NAME: former_name}, **options)


class Text(str):
    """A value as it was typed on the command line: `bind` reads it by the type of its field."""


def load_file(spec: str) -> dict[str, Any]:
    """Runs `get_config()` of a config file and returns its values as nested dicts.

    Args:
      spec: `FILE.py`, or `FILE.py:arg` to call `get_config("arg")`.

    Raises:
      UserError: no such file, none that can be run, no `get_config`, or a result that is not a
          `ConfigDict`.
    """
    path, colon, argument = spec.partition(":")
    if not pathlib.Path(path).is_file():
        raise UserError("config", path, "is not a file.")
    module_spec = importlib.util.spec_from_file_location("tessera_config", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError("config", path, "is not a Python file (*.py).")
    module = importlib.util.module_from_spec(module_spec)
    root = _package_root(pathlib.Path(path))
    if root not in sys.path:
        sys.path.append(root)  # the config imports its neighbours, wherever the command is called
    with _naming_line(path, spec):
        module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError("config", path, "has no get_config().")
    with _naming_line(path, spec):
        values = module.get_config(argument) if colon else module.get_config()
    if not isinstance(values, ml_collections.ConfigDict):
        raise UserError("config", spec, ": get_config() must return an ml_collections.ConfigDict.")
    return plain(values)


def _package_root(path: pathlib.Path) -> str:
    """Returns the folder from which a file's own package is imported."""
    folder = path.absolute().parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return str(folder)


@contextlib.contextmanager
def _naming_line(path: str, spec: str) -> Iterator[None]:
    """Turns whatever a config file raises into a UserError that names the file's line."""
    try:
        yield
    except UserError:
        raise
    except SyntaxError as error:
        raise UserError(
            "config", spec, f"cannot be run: line {error.lineno}: {error.msg}."
        ) from error
    except Exception as error:
        lines = [
            frame.lineno
            for frame in traceback.extract_tb(error.__traceback__)
            if frame.filename == path
        ]
        where = f"line {lines[-1]}: " if lines else ""
        raise UserError(
            "config", spec, f"cannot be run: {where}{type(error).__name__}: {error}."
        ) from error


def plain(values: Any) -> Any:
    """Returns `values` with every mapping a dict and every sequence a list, as JSON would hold
    them.
    """
    if dataclasses.is_dataclass(values):
        return {
            field.name: plain(getattr(values, field.name)) for field in dataclasses.fields(values)
        }
    if isinstance(values, (ml_collections.ConfigDict, Mapping)):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return values


def override(values: dict[str, Any], assignments: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Returns `values` with each `(dotted.name, text)` put in its place; a number in the name
    indexes a list.

    Whether a name is known is decided by `bind`, which sees the dataclass.

    Raises:
      UserError: a name that leads through a value that is neither a group nor a list.
    """
    values = plain(values)
    for name, text in assignments:
        *groups, last = name.split(".")
        place: Any = values
        for group in groups:
            if isinstance(place, dict):
                place[group] = place[group] if place.get(group) is not None else {}
            place = place[_index(place, group, name)]
        if not isinstance(place, (dict, list)):
            raise UserError(
                name, constraint=f": {'.'.join(groups)} is a value, not a group of fields."
            )
        place[last if isinstance(place, dict) else _index(place, last, name)] = Text(text)
    return values


def _index(place: Any, key: str, name: str) -> Any:
    if isinstance(place, dict):
        return key
    if isinstance(place, list) and key.isdigit() and int(key) < len(place):
        return int(key)
    if isinstance(place, list):
        raise UserError(name, constraint=f": {key!r} is not an index below {len(place)}.")
    raise UserError(name, constraint=f": {key!r} lies inside a value, not a group of fields.")


def bind(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Makes a frozen dataclass of type `cls` from nested dicts: every key known, every value of its
    field's type.

    Args:
      cls: the dataclass; its fields may be dataclasses, tuples and dicts of them, literals and
          optional values.
      values: the nested dicts.
      where: the dotted name of this group, for messages.

    Raises:
      UserError: an unknown or missing field, a value of another type, or a value that `cls` itself
          refuses.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = _with_new_names(fields, values, where)
    for key in values:
        if key not in fields:
            raise UserError(
                join(where, key), constraint=f"is not a config field. {_advice(cls, key, fields)}"
            )
    bound = {key: _convert(hints[key], value, join(where, key)) for key, value in values.items()}
    missing = [name for name, field in fields.items() if name not in bound and _required(field)]
    if missing:
        raise UserError(join(where, missing[0]), constraint="is missing: it has no default.")
    with within(where):
        return cls(**bound)


def _with_new_names(
    fields: Mapping[str, dataclasses.Field], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Returns `values` with each former name replaced by that of its field."""
    new_names = {
        field.metadata[_FORMER_NAME]: name
        for name, field in fields.items()
        if _FORMER_NAME in field.metadata
    }
    values = dict(values)
    for former, name in new_names.items():
        if former not in values:
            continue
        if name in values:
            raise UserError(
                join(where, former), constraint=f"is the former name of {name}, which is given too."
            )
        _say_renamed(join(where, former), join(where, name))
        values[name] = values.pop(former)
    return values


@functools.cache
def _say_renamed(former: str, name: str) -> None:
    """Says so once a process, however often a config is bound."""
    logger.warning("%s is called %s now; the former name is still read", former, name)


def _advice(cls: type, key: str, fields: Mapping[str, Any]) -> str:
    """Names the field of that very name in a group below, or else the nearest field of this
    group.
    """
    for name, hint in typing.get_type_hints(cls).items():
        for candidate in (hint, *typing.get_args(hint)):
            if dataclasses.is_dataclass(candidate) and key in {
                field.name for field in dataclasses.fields(candidate)
            }:
                return f"Did you mean '{name}.{key}'?"
    return nearest(key, fields)


def _required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Returns `value` as the type `hint`, or raises UserError."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if (value is None or (isinstance(value, Text) and value.lower() == "none")) and type(
            None
        ) in args:
            return None
        (inner, *others) = [arg for arg in args if arg is not type(None)]
        assert not others, f"{name}: only optional unions are supported"
        return _convert(inner, value, name)
    if origin is Literal:
        kinds = {type(arg) for arg in args}
        converted = _scalar(kinds.pop(), value, name) if len(kinds) == 1 else value
        if converted not in args:
            choices = ", ".join(repr(arg) for arg in args)
            raise UserError(
                name, value, f"is not one of {choices}. {nearest(str(value), map(str, args))}"
            )
        return converted
    if origin is tuple:
        return _convert_tuple(args, value, name)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise UserError(name, value, "must be a group of fields.")
        return {key: _convert(args[1], item, join(name, key)) for key, item in value.items()}
    if dataclasses.is_dataclass(hint):
        if isinstance(value, hint):
            return value
        if not isinstance(value, Mapping):
            raise UserError(name, value, f"must be a group of fields, as in {name}.FIELD = …")
        return bind(hint, value, name)
    return _scalar(hint, value, name)


def _convert_tuple(args: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    if isinstance(value, Text):
        value = [Text(item.strip()) for item in value.strip("()[] ").split(",") if item.strip()]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(name, value, "must be a list.")
    if len(args) == 2 and args[1] is Ellipsis:
        args = (args[0],) * len(value)
    if len(args) != len(value):
        raise UserError(name, list(value), f"must have {len(args)} items, not {len(value)}.")
    return tuple(
        _convert(arg, item, f"{name}.{i}")
        for i, (arg, item) in enumerate(zip(args, value, strict=True))
    )


_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_KIND_NAMES = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "a string",
}


def _scalar(kind: type, value: Any, name: str) -> Any:
    try:
        converted = _read(kind, value) if isinstance(value, Text) else value
    except (ValueError, KeyError):
        converted = None
    if kind is float and type(converted) is int:
        converted = float(converted)
    # A bool is an int to Python; NaN and infinity pass every comparison with a bound and are no
    # JSON.
    wrong = not isinstance(converted, kind) or (isinstance(converted, bool) and kind is not bool)
    if wrong or (kind is float and not math.isfinite(converted)):
        raise UserError(name, value, f"must be {_KIND_NAMES[kind]}.")
    return converted


def _read(kind: type, text: Text) -> Any:
    return _WORDS[text.lower()] if kind is bool else kind(str(text))


def _show(value: Any) -> str:
    return repr(str(value)) if isinstance(value, Text) else repr(value)


def to_json(config: Any) -> str:
    """Returns a bound config as indented JSON, the form that a workdir keeps."""
    return json.dumps(plain(config), indent=2) + "\n"


def first_difference(a: Any, b: Any, where: str = "") -> str | None:
    """Returns the dotted name of the first field in which two plain configs differ, or None."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            if key not in a or key not in b:
                return join(where, key)
            found = first_difference(a[key], b[key], join(where, key))
            if found is not None:
                return found
        return None
    return None if a == b else where

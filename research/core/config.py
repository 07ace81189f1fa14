"""Configs: Python files with `get_config()`, dotted overrides, strict binding to frozen
dataclasses.

A config is plain nested dicts until `bind` makes it a dataclass; after that no code looks fields up
by name.
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

from research.core.errors import UserError, join, nearest, similar, within

C = TypeVar("C")

logger = logging.getLogger("tessera")

_FORMER_NAME = "former_name"


def renamed(former_name: str, **options: Any) -> Any:
    """Returns a dataclass field that `bind` also takes under its former name, with a warning.

    Args:
      former_name: of the field, which configs of users and workdirs may still have.
      **options: of `dataclasses.field`, such as its default.
    """
    return dataclasses.field(metadata={_FORMER_NAME: former_name}, **options)


class Text(str):
    """A value as it was typed on the command line: `bind` parses it by the type of its field."""


def load_file(spec: str) -> dict[str, Any]:
    """Runs `get_config()` of a config file and returns its values as nested dicts.

    Args:
      spec: `FILE.py`, or `FILE.py:arg` to call `get_config("arg")`.

    Raises:
      UserError: there is no such file, it cannot be run, it refuses its argument, it has no
          `get_config`, or that returns no `ConfigDict`.
    """
    # pretrain/gpt2.py:medium -> pretrain/gpt2.py, medium
    path, colon, argument = spec.partition(":")
    module = _run_file(path, spec)
    if not hasattr(module, "get_config"):
        raise UserError("config", path, "has no get_config().")
    arguments = [argument] if colon else []
    with _naming_line(path, spec):
        values = module.get_config(*arguments)
    if not isinstance(values, ml_collections.ConfigDict):
        raise UserError("config", spec, ": get_config() must return an ml_collections.ConfigDict.")
    return plain(values)


def preset_names(path: str) -> list[str]:
    """Returns the arguments of a config file that its `PRESETS` name, none where it has none."""
    return list(vars(_run_file(path, path)).get("PRESETS", ()))


def _run_file(path: str, spec: str) -> Any:
    """Returns the module that a config file is."""
    if not pathlib.Path(path).is_file():
        raise UserError("config", path, "is not a file.")
    module_spec = importlib.util.spec_from_file_location("tessera_config", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError("config", path, "is not a Python file (*.py).")
    module = importlib.util.module_from_spec(module_spec)

    # A config imports other configs of its package, from whatever folder the command is called.
    root = _package_root(pathlib.Path(path))
    if root not in sys.path:
        sys.path.append(root)
    with _naming_line(path, spec):
        module_spec.loader.exec_module(module)
    return module


def _package_root(path: pathlib.Path) -> str:
    """Returns the folder from which a file's own package is imported."""
    # configs/pretrain/gpt2.py -> the folder of configs, if configs and pretrain are packages.
    folder = path.absolute().parent
    while (folder / "__init__.py").exists():
        folder = folder.parent
    return str(folder)


@contextlib.contextmanager
def _naming_line(path: str, spec: str) -> Iterator[None]:
    """Turns whatever a config file raises into a UserError that names the file, with its argument,
    and the line where that is known.
    """
    try:
        yield
    except UserError as error:
        # What the file itself refuses, such as an unknown size: size = '99b' is not …
        raise UserError("config", spec, f": {error}") from error
    except SyntaxError as error:
        raise UserError(
            "config", spec, f"cannot be run: line {error.lineno}: {error.msg}."
        ) from error
    except Exception as error:
        # The innermost line of the file itself, not of what it calls.
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        where = f"line {lines[-1]}: " if lines else ""
        kind = type(error).__name__
        raise UserError("config", spec, f"cannot be run: {where}{kind}: {error}.") from error


def plain(values: Any) -> Any:
    """Returns `values` with every mapping a dict and every sequence a list, as JSON would hold
    them.
    """
    if dataclasses.is_dataclass(values):
        names = [field.name for field in dataclasses.fields(values)]
        return {name: plain(getattr(values, name)) for name in names}
    if isinstance(values, (ml_collections.ConfigDict, Mapping)):
        return {key: plain(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [plain(value) for value in values]
    return values


def override(values: dict[str, Any], assignments: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Returns `values` with each `(dotted.name, text)` assigned; a number in the name indexes a
    list.

    `bind` checks whether a name is known.

    Raises:
      UserError: a name that leads through a value that is neither a group nor a list.
    """
    values = plain(values)
    for name, text in assignments:
        *groups, last = name.split(".")
        # layers.0.width = 8: assigns 8 to "width" of the group values["layers"][0].
        parent: Any = values
        for group in groups:
            if isinstance(parent, dict) and parent.get(group) is None:
                # The group is not given yet, or None.
                parent[group] = {}
            parent = parent[_index(parent, group, name)]
        if not isinstance(parent, (dict, list)):
            path = ".".join(groups)
            raise UserError(name, constraint=f": {path} is a value, not a group of fields.")
        parent[_index(parent, last, name)] = Text(text)
    return values


def _index(parent: Any, key: str, name: str) -> Any:
    """Returns the key or the index of a part of the dotted `name` in its group or list."""
    if isinstance(parent, dict):
        return key
    if not isinstance(parent, list):
        raise UserError(name, constraint=f": {key!r} is inside a value, not a group of fields.")
    size = len(parent)
    if not key.isdigit() or int(key) >= size:
        raise UserError(name, constraint=f": {key!r} is not an index below {size}.")
    return int(key)


def bind(cls: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Makes a frozen dataclass of type `cls` from nested dicts.

    Every key must be a field, and every value must have its field's type.

    Args:
      cls: the dataclass; its fields may be dataclasses, tuples and dicts of them, literals and
          optional values.
      values: the nested dicts.
      where: the dotted name of this group, for messages.

    Raises:
      UserError: an unknown or missing field, a value of another type, or a value that `cls` itself
          rejects.
    """
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = _with_new_names(fields, values, where)
    for key in values:
        if key not in fields:
            advice = _advice(cls, key, fields)
            raise UserError(join(where, key), constraint=f"is not a config field. {advice}")

    bound = {}
    for key, value in values.items():
        bound[key] = _convert(hints[key], value, join(where, key))
    required = [name for name, field in fields.items() if _required(field)]
    for name in required:
        if name not in bound:
            raise UserError(join(where, name), constraint="is missing: it has no default.")
    with within(where):
        return cls(**bound)


def check_types(config: Any) -> None:
    """Raises UserError where a field of a dataclass has another type than is said of it: of one
    that was not made by `bind`.
    """
    hints = _hints(type(config))
    for field in dataclasses.fields(config):
        _convert(hints[field.name], getattr(config, field.name), field.name)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _with_new_names(
    fields: Mapping[str, dataclasses.Field], values: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Returns `values` with each former name replaced by that of its field."""
    values = dict(values)
    for name, field in fields.items():
        if _FORMER_NAME not in field.metadata:
            continue
        former = field.metadata[_FORMER_NAME]
        if former not in values:
            continue
        _warn_renamed(join(where, former), join(where, name))
        value = values.pop(former)
        if name not in values:
            values[name] = value
            continue

        # Both are given. The command line, whose values are Text, overrides the file.
        is_override = isinstance(value, Text)
        if is_override == isinstance(values[name], Text):
            raise UserError(
                join(where, former), constraint=f"is the former name of {name}, which is given too."
            )
        if is_override:
            values[name] = value
    return values


@functools.cache
def _warn_renamed(former: str, name: str) -> None:
    """Warns once per process, however often a config is bound."""
    logger.warning("%s is called %s now; the former name is still read", former, name)


def _advice(cls: type, key: str, fields: Mapping[str, Any]) -> str:
    """Returns advice for an unknown `key`: the field of the same name in a subgroup, or else the
    field of this group with the most similar name.
    """
    for name, hint in typing.get_type_hints(cls).items():
        # An optional group's type, `Group | None`, has the group among its arguments.
        groups = filter(dataclasses.is_dataclass, (hint, *typing.get_args(hint)))
        for group in groups:
            if key in [field.name for field in dataclasses.fields(group)]:
                return f"Did you mean '{name}.{key}'?"
    return nearest(key, fields)


def _required(field: dataclasses.Field) -> bool:
    has_default = field.default is not dataclasses.MISSING
    has_factory = field.default_factory is not dataclasses.MISSING
    return not has_default and not has_factory


def _convert(hint: Any, value: Any, name: str) -> Any:
    """Returns `value` as the type `hint`, or raises UserError."""
    origin = typing.get_origin(hint)
    args = typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_optional(args, value, name)
    if origin is Literal:
        return _convert_literal(args, value, name)
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


def _convert_optional(args: tuple[Any, ...], value: Any, name: str) -> Any:
    """Returns `value` as the type T of `T | None`, whose `args` are T and None's type."""
    (inner, *others) = [arg for arg in args if arg is not type(None)]
    assert not others, f"{name}: only optional unions are supported"
    if value is None:
        return None
    if isinstance(value, Text) and value.lower() == "none":
        return None
    return _convert(inner, value, name)


def _convert_literal(choices: tuple[Any, ...], value: Any, name: str) -> Any:
    """Returns `value` if it is one of the choices of a `Literal`."""
    kinds = {type(choice) for choice in choices}
    converted = value
    if len(kinds) == 1:
        converted = _scalar(kinds.pop(), value, name)
    if converted in choices:
        return converted

    listed = ", ".join(repr(choice) for choice in choices)
    match = similar(str(value), map(str, choices))
    advice = "" if match is None else f" Did you mean {match!r}?"
    raise UserError(name, value, f"is not one of {listed}.{advice}")


def _convert_tuple(args: tuple[Any, ...], value: Any, name: str) -> tuple[Any, ...]:
    """Returns `value` as a tuple of the types `args`, which may be `T, ...`."""
    if isinstance(value, Text):
        value = _split(value)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(name, value, "must be a list.")
    if Ellipsis in args:
        # tuple[int, ...] with 3 values -> int, int, int
        args = (args[0],) * len(value)
    if len(args) != len(value):
        raise UserError(name, list(value), f"must have {len(args)} items, not {len(value)}.")
    converted = []
    for index, (arg, item) in enumerate(zip(args, value, strict=True)):
        item_name = f"{name}.{index}"
        converted.append(_convert(arg, item, item_name))
    return tuple(converted)


def _split(text: Text) -> list[Text]:
    """Returns the items of a list as it was typed: `(1, 2)`, `[1, 2]` or `1,2`."""
    items = text.strip("()[] ").split(",")
    items = [item.strip() for item in items]
    # "()" and "(1,)" end in an empty item.
    return [Text(item) for item in items if item]


_BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
_KIND_NAMES = {
    int: "a whole number",
    float: "a finite number",
    bool: "True or False",
    str: "a string",
}


def _scalar(kind: type, value: Any, name: str) -> Any:
    """Returns `value` as an int, float, bool or str, or raises UserError."""
    converted = _parse(kind, value) if isinstance(value, Text) else value
    if kind is float and type(converted) is int:
        converted = _to_float(converted)

    is_valid = isinstance(converted, kind)
    if isinstance(converted, bool):
        # To Python a bool is an int.
        is_valid = kind is bool
    if is_valid and kind is float:
        # NaN passes the checks of bounds, and neither NaN nor infinity is valid JSON.
        is_valid = math.isfinite(converted)
    if not is_valid:
        raise UserError(name, value, f"must be {_KIND_NAMES[kind]}.")
    return converted


def _to_float(number: int) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _parse(kind: type, text: Text) -> Any:
    """Returns a text as a scalar of this type, or None where it is none."""
    try:
        return _BOOLS[text.lower()] if kind is bool else kind(str(text))
    except (ValueError, KeyError):
        return None


def to_json(config: Any) -> str:
    """Returns a bound config as indented JSON, as it is saved in a workdir."""
    return json.dumps(plain(config), indent=2) + "\n"

"""A config.json in parts: groups of fields that several architectures share, each readable and
writable by itself.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from research.core.errors import UserError
from research.core.trees import nested
from research.interop.architecture import Architecture
from research.interop.tensor import TensorSpec
from research.models.config import ModelConfig

# Prefix of the fields of layers in what `read` returns: `layers.window` is a list of L windows.
_LAYERS = "layers."


def _nothing(_: Any) -> dict[str, Any]:
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Some fields of a config.json and what they mean for a model.

    Attributes:
      read: returns values by the dotted names of a `ModelConfig`'s fields, or lists of them, one
        per layer, by the names of a `LayerConfig`'s behind `layers.`.
      write: returns the fields; raises UserError for a model that they cannot express.
      required, defaults, only, inert: see `Architecture`.
    """

    read: Callable[[Mapping[str, Any]], dict[str, Any]] = _nothing
    write: Callable[[ModelConfig], dict[str, Any]] = _nothing
    required: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inert: tuple[str, ...] = ()


def named(names: Mapping[str, str], **defaults: Any) -> Part:
    """Returns the part of fields that are those of a `ModelConfig` by another name.

    Args:
      names: of the fields -> dotted names.
      defaults: of the fields that may be missing.
    """
    return Part(
        read=lambda fields: {ours: fields[theirs] for theirs, ours in names.items()},
        write=lambda config: {theirs: _value(config, ours) for theirs, ours in names.items()},
        required=tuple(name for name in names if name not in defaults),
        defaults=defaults,
    )


def renamed_field(field: str, older: str, name: str, default: Any) -> Part:
    """Returns the part of a field that has had two names, of which the first is written.

    Args:
      field, older: its names.
      name: the dotted name.
      default: where neither is there.
    """

    def read(fields: Mapping[str, Any]) -> dict[str, Any]:
        given = [fields[each] for each in (field, older) if fields[each] is not None]
        if not given:
            return {name: default}
        if len(set(given)) > 1:
            raise UserError(field, given[0], f"must equal {older} = {given[1]!r}.")
        return {name: given[0]}

    return Part(
        read=read,
        write=lambda config: {field: _value(config, name)},
        defaults={field: None, older: None},
    )


def fixed(values: Mapping[str, Any]) -> Part:
    """Returns the part of values that all models of an architecture have, by dotted names."""
    return Part(read=lambda _: dict(values))


def _value(config: ModelConfig, name: str) -> Any:
    *groups, last = name.split(".")
    group: Any = config
    for each in groups:
        group = getattr(group, each)
        if group is None:
            raise UserError(f"{each} is not set")
    return getattr(group, last)


def architecture(
    model_type: str,
    model_class: str,
    tensors: tuple[TensorSpec, ...],
    parts: Sequence[Part],
    **rest: Any,
) -> Architecture:
    """Returns an architecture whose config.json consists of parts.

    Args:
      model_type, model_class, tensors, rest: see `Architecture`.
      parts: of its config.json; where two give the same value, the later one wins.
    """

    def read(fields: Mapping[str, Any]) -> dict[str, Any]:
        values = _merged(part.read(fields) for part in parts)
        layers = _pop_layers(values)
        if layers:
            values |= shortest_pattern(layers)
        return nested(values, ".")

    defaults = _merged(part.defaults for part in parts)
    return Architecture(
        model_type=model_type,
        model_class=model_class,
        tensors=tensors,
        # A part may have a default for a field that another part requires.
        required=tuple(name for part in parts for name in part.required if name not in defaults),
        defaults=defaults,
        only=_merged(part.only for part in parts),
        inert=tuple(name for part in parts for name in part.inert),
        read=read,
        write=lambda config: _merged(part.write(config) for part in parts),
        **rest,
    )


def _pop_layers(values: dict[str, Any]) -> list[dict[str, Any]]:
    """Removes the lists of layers' fields from values, and returns the fields of each layer."""
    columns = {}
    for name in list(values):
        if name.startswith(_LAYERS):
            columns[name.removeprefix(_LAYERS)] = values.pop(name)

    # {"window": [4, None], "experts": [False, True]}
    # -> [{"window": 4, "experts": False}, {"window": None, "experts": True}]
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _merged(groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns all groups as one; a later one wins."""
    merged = {}
    for group in groups:
        merged |= group
    return merged


def shortest_pattern(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the `first_layers` and the `pattern` that give these layers and are the fewest
    together.

    Args:
      layers: the values of a `LayerConfig` each; those of a pattern agree in `experts`.
    """
    best = None
    # [dense, local, global, local, global] -> one first layer and a pattern of two.
    for first in range(len(layers)):
        rest = layers[first:]
        period = _period(rest)
        # The layers of a pattern have the same parameters.
        experts = [layer.get("experts") for layer in rest[:period]]
        if any(each != experts[0] for each in experts):
            continue
        if best is None or first + period < sum(best):
            best = (first, period)

    assert best is not None, "the last layer alone is a pattern"
    first, period = best
    return {"first_layers": list(layers[:first]), "pattern": list(layers[first : first + period])}


def _period(layers: Sequence[Mapping[str, Any]]) -> int:
    """Returns the least n such that the first n layers repeated give all: [a, b, a, b, a] -> 2."""
    for n in range(1, len(layers)):
        if layers[n:] == layers[:-n]:
            return n
    return len(layers)

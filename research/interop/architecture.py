"""An architecture of Hugging Face as data: the parameters of each tensor, the meaning of a field.

An architecture is a value, as a family is a value of `ModelConfig`: nothing here or in the engine
knows one by name.
"""

import dataclasses
import logging
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from research.core.config import bind, plain
from research.core.errors import UserError, listed, shown
from research.interop.tensor import TensorSpec
from research.interop.unread import is_off, is_unread
from research.models.config import ModelConfig

logger = logging.getLogger("tessera")

# Fields of every config.json that change nothing a model computes from tokens to logits.
INERT = (
    "_name_or_path",
    "architectures",
    "chunk_size_feed_forward",
    "dtype",
    "id2label",
    "label2id",
    "model_type",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "problem_type",
    "return_dict",
    "task_specific_params",
    "tokenizer_class",
    "torch_dtype",
    "transformers_version",
    "unk_token_id",
    "use_cache",
)
# Fields of a model that config.json does not have: where and how it runs, and what only training
# uses.
NOT_CONVERTED = {
    "": ("dropout", "dtype", "layer_loop", "param_dtype", "remat"),
    "attention": ("implementation",),
    "experts": ("balance_weight", "bias_speed", "z_weight"),
    "head": ("mtp_weight",),
}
# More layers than any model has: reading a config.json visits each of them.
MOST_LAYERS = 10_000
# Names of rates of dropout.
_DROPOUT = re.compile(r"dropout|pdrop|layerdrop")
# Letters of the longest value of a field.
_MOST_LETTERS = 1000
# Numbers with a smaller relative difference are the same: config.json may have another function of
# one, as a rounded decimal.
_TOLERANCE = 1e-9
# How many architectures a message names.
_MOST_REASONS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """An architecture of Hugging Face.

    Attributes:
      model_type: its name in config.json.
      model_class: the class of `transformers` that has a language model's head; `write` may name
          another one.
      tensors: the parameters in each tensor; a tensor whose parameters a model does not have is
        not there.
      classes: class of `transformers` -> regular expression of a tensor that only it has, the
        fullest class first. The tensors, not `architectures` of config.json, say which it is: some
        folders hold more than the class that they were saved for.
      counted: field of config.json -> regular expression of a tensor of what it counts. Without
        such a tensor the count is 0: `transformers` saves the number of layers that it leaves out.
      prefixes: of tensor names, that some folders have and others leave out.
      spellings: (regular expression, replacement) of names that older folders have for the same
          tensors.
      copies: tensor -> the tensor that it repeats. Copies are not written; read, they must be
        equal, and one stands in for the other where only one is there. A name that is a tensor of
        the model is no copy (an output projection that is not tied).
      ignored: regular expression of tensors that no parameter takes -> why.
      required: fields of config.json without a default, all of them counts.
      defaults: fields that may be missing, with the defaults of `transformers`.
      only: fields that have one supported value each.
      inert: fields that change no logit, beside `INERT` and those of `unread`.
      from_tensors: returns the fields that follow from the tensors, from all fields and the tensors
        by name.
      read: returns the values of a `ModelConfig` from the fields.
      write: returns the fields of a `ModelConfig`; raises UserError for one that it cannot express.
    """

    model_type: str
    model_class: str
    tensors: tuple[TensorSpec, ...]
    classes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    counted: Mapping[str, str] = dataclasses.field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    spellings: tuple[tuple[str, str], ...] = ()
    copies: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: Mapping[str, str] = dataclasses.field(default_factory=dict)
    required: tuple[str, ...]
    defaults: Mapping[str, Any]
    only: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    inert: tuple[str, ...] = ()
    from_tensors: Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]] = (
        lambda fields, tensors: {}
    )
    read: Callable[[Mapping[str, Any]], dict[str, Any]]
    write: Callable[[ModelConfig], dict[str, Any]]


def config_from(architecture: Architecture, fields: Mapping[str, Any]) -> ModelConfig:
    """Returns the model of a config.json.

    Raises:
      UserError: fields that are missing, ask for what Tessera does not have, or are not known and
        might change a logit; all of them are named.
    """
    a = architecture
    if fields.get("quantization_config"):
        raise UserError(
            "quantization_config is set: its weights are quantized, and only plain ones are read."
        )
    faults = [*_counts_missing(a, fields), *_unsupported(a, fields)]
    if faults:
        raise UserError(f"{listed(faults, '; ')}.")
    try:
        values = a.read({**a.defaults, **fields})
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # A field of another type than its architecture has, for instance.
        one_line = " ".join(str(error).split())
        raise UserError(
            f"a field of {a.model_type!r} has a value that makes no model: {one_line}."
        ) from error
    return bind(ModelConfig, values)


def _counts_missing(a: Architecture, fields: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the required fields."""
    for name in a.required:
        # 2**31 is JAX's own limit of an axis.
        limit = MOST_LAYERS if "layer" in name else 2**31
        if name not in fields:
            yield f"{name} is missing"
        elif type(fields[name]) is not int or not 1 <= fields[name] < limit:
            yield (
                f"{name} = {shown(fields[name])} must be a whole number of at least 1 and below "
                f"{limit:,}"
            )


def _unsupported(a: Architecture, fields: Mapping[str, Any]) -> Iterator[str]:
    """Yields what is wrong with the other fields; those that are left out are logged."""
    known = {*a.required, *a.defaults, *a.inert, *INERT}
    unread = []
    for name, value in fields.items():
        if isinstance(value, str) and len(value) > _MOST_LETTERS:
            yield f"{name} = {shown(value)} is longer than any value"
        elif name in a.only:
            if value != a.only[name]:
                yield f"{name} = {shown(value)} is not supported: only {a.only[name]!r} is"
        elif name in known or is_off(value):
            continue
        elif is_unread(name):
            unread.append(name)
        elif _DROPOUT.search(name) and isinstance(value, float | int):
            logger.warning(
                "%s = %s is left out: Tessera drops nothing there. Only training would differ.",
                name,
                value,
            )
        else:
            yield f"{name} = {shown(value)} is a field of {a.model_type!r} that is not supported"
    if unread:
        logger.info(
            "left out of config.json, as no logit depends on them: %s",
            listed(sorted(unread), limit=50),
        )


def fields_of(
    architecture: Architecture, fields: Mapping[str, Any], tensors: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a config.json with what follows from the tensors: their class, and counts of 0 for
    what is not there.

    Args:
      architecture: what it is.
      fields: the config.json.
      tensors: those beside it, by name.
    """
    known = dict(fields)
    if architecture.classes:
        known["architectures"] = [class_of(architecture, tensors)]
    for field, pattern in architecture.counted.items():
        # transformers saves the count of DeepSeek-V3's MTP layers, but not the layers.
        if any(re.search(pattern, name) for name in tensors):
            continue
        if fields.get(field):
            logger.info("%s = %s is left out: no tensor is of it", field, fields[field])
        known[field] = 0

    with_defaults = {**architecture.defaults, **fields}
    return known | architecture.from_tensors(with_defaults, tensors)


def class_of(architecture: Architecture, names: Iterable[str]) -> str:
    """Returns the class of `transformers` whose tensors these are; the last of the classes where
    none is certain.
    """
    names = list(names)
    for name, pattern in architecture.classes.items():
        if any(re.search(pattern, each) for each in names):
            return name
    return next(reversed(architecture.classes), architecture.model_class)


def fields_from(architecture: Architecture, config: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model.

    Raises:
      UserError: the architecture cannot express the model; the message starts with the field.
    """
    fields, differences = _write_and_compare(architecture, config)
    if differences:
        raise UserError(f"{differences[0]} is not what {architecture.model_type!r} has.")
    return fields


def choose(
    architectures: Iterable[Architecture], config: ModelConfig, first: str | None = None
) -> tuple[Architecture, dict[str, Any]]:
    """Returns the first architecture that holds a model, and its config.json.

    Args:
      architectures: in order of preference.
      config: the model.
      first: the model_type to try before all others: the one that the model came from.

    Raises:
      UserError: none can express it; for the nearest ones, the field that differs is named.
    """
    # Of each architecture that cannot express it: how many fields differ, and the reason.
    reasons = []
    for architecture in sorted(architectures, key=lambda each: each.model_type != first):
        name = architecture.model_type
        try:
            fields, differences = _write_and_compare(architecture, config)
        except UserError as error:
            message = str(error).rstrip(".")
            reasons.append((sys.maxsize, f"{name!r}: {message}"))
            continue
        if not differences:
            return architecture, fields
        reasons.append((len(differences), f"{differences[0]} is not what {name!r} has"))

    reasons.sort(key=lambda reason: reason[0])
    nearest = "; ".join(text for _, text in reasons[:_MOST_REASONS])
    raise UserError(f"no Hugging Face architecture holds this model: {nearest}.")


def _write_and_compare(
    architecture: Architecture, config: ModelConfig
) -> tuple[dict[str, Any], list[str]]:
    """Returns the config.json nearest to a model, and the dotted names of what differs in it."""
    fields = {
        "architectures": [architecture.model_class],
        "model_type": architecture.model_type,
        "dtype": "float32",
        **architecture.write(config),
    }
    read_back = config_from(architecture, fields)
    return fields, _differences(_converted(config), _converted(read_back))


def _converted(config: ModelConfig) -> dict[str, Any]:
    """Returns the values of a model that config.json has, those of each layer by its number."""
    values = plain(config)
    for group, names in NOT_CONVERTED.items():
        fields = values[group] if group else values
        for name in names:
            # A group that a model does not have is None.
            if fields is not None:
                fields.pop(name, None)

    layers = config.layers()
    if config.experts is not None and all(layer.experts for layer in layers):
        # The width of an MLP that no layer has.
        del values["mlp"]["hidden_dim"]

    # Two models may have the same layers in first_layers and pattern of other lengths.
    del values["first_layers"]
    del values["pattern"]
    values["layers"] = {}
    for number, layer in enumerate(layers):
        position = plain(config.position_of(layer))
        values["layers"][str(number)] = plain(layer) | {"position": position}
    return values


def _differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Returns the dotted names of the values that differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        differences = []
        for key in {**a, **b}:
            inner = f"{path}.{key}" if path else key
            differences += _differences(a.get(key), b.get(key), inner)
        return differences

    # 0.1 read back from another function of it is 0.1 but for rounding.
    if isinstance(a, float) and isinstance(b, float):
        same = math.isclose(a, b, rel_tol=_TOLERANCE)
    else:
        same = a == b
    return [] if same else [path]

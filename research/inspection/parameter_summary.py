"""A model taken apart: its parameters as a tree of named shapes, counted without an array ever
being made.
"""

import dataclasses
import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp

from research.core.trees import count
from research.models.cache import empty_cache
from research.models.config import LayerConfig, ModelConfig
from research.models.language_model import language_model
from research.models.stack import layer_name
from research.parallel.parameter import is_box

# What a token meets before the layers, and last; all else stands between in the order of its
# making.
_FIRST = ("embed", "encoder", "position_embed", "type_embed", "position_bias", "embed_norm")
_LAST = ("transform", "unembed", "logit_bias")


@dataclasses.dataclass(frozen=True)
class Part:
    """A parameter, a module of parts, or layers that are built alike.

    Attributes:
      name: of the module or parameter; of layers, which they are.
      shape: of a parameter.
      axes: logical names of its axes.
      parts: of a module.
      times: how many layers are built so; None for what is no layer.
    """

    name: str
    shape: tuple[int, ...] = ()
    axes: tuple[str, ...] = ()
    parts: tuple["Part", ...] = ()
    times: int | None = None

    @property
    def each(self) -> int:
        """Parameters of it, or of one of the layers."""
        return sum(part.count for part in self.parts) if self.parts else math.prod(self.shape)

    @property
    def count(self) -> int:
        """Parameters of it, or of all of the layers."""
        return self.each if self.times is None else self.each * self.times

    def parameters(self, times: int = 1) -> Iterator[tuple[str, "Part", int]]:
        """Yields the path of each parameter, the parameter, and how often it is there."""
        times *= 1 if self.times is None else self.times
        if not self.parts:
            yield self.name, self, times
        for part in self.parts:
            yield from (
                (f"{self.name}/{path}", leaf, number)
                for path, leaf, number in part.parameters(times)
            )


def take_apart(config: ModelConfig) -> Part:
    """Returns the parameters of a model as a tree, layers that do the same as one part of it.

    Only one layer of each build is traced, so that a model of any size takes a second.
    """
    found: list[Part] = []

    def trace() -> Any:
        params = language_model(_shortened(config)).init(jax.random.key(0))
        # Modules still stand in the order in which a token meets them; what `eval_shape` returns is
        # sorted.
        found.append(Part("model", parts=tuple(_stack(config, params))))
        return params

    jax.eval_shape(trace)
    return found[0]


def _shortened(config: ModelConfig) -> ModelConfig:
    """Returns the model with its first layers and one more of each stack: those of a pattern are
    built alike.
    """
    enough = len(config.first_layers) + 1
    return dataclasses.replace(
        config,
        num_layers=min(config.num_layers, enough),
        encoder_layers=min(config.encoder_layers, enough),
        layer_loop="unroll",
    )


def _stack(config: ModelConfig, params: dict[str, Any]) -> Iterator[Part]:
    """Yields the parts of a stack in the order in which a token meets them."""
    for name in _FIRST:
        if name == "encoder" and name in params:
            yield Part(name, parts=tuple(_stack(config.encoder(), params[name])))
        elif name in params:
            yield _part(name, params[name])
    for indices in layer_kinds(config).values():
        built = params[layer_name(config, min(indices[0], len(config.first_layers)))]
        yield dataclasses.replace(_part(layers_name(indices), built), times=len(indices))
    others = [name for name in params if "layers_" not in name and name not in (*_FIRST, *_LAST)]
    yield from (
        _part(name, params[name]) for name in (*others, *(name for name in _LAST if name in params))
    )


def _part(name: str, value: Any) -> Part:
    if is_box(value):
        return Part(name, value.value.shape, value.names)
    return Part(name, parts=tuple(_part(key, item) for key, item in value.items()))


def layer_kinds(config: ModelConfig) -> dict[LayerConfig, list[int]]:
    """Returns which layers do the same, by what they do."""
    kinds: dict[LayerConfig, list[int]] = {}
    for index, kind in enumerate(config.layers()):
        kinds.setdefault(kind, []).append(index)
    return kinds


def layers_name(indices: list[int]) -> str:
    """Returns layers by their numbers, runs of them as one: `layers 0–4, 6–10, …, 24–25`."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    texts = [str(first) if first == last else f"{first}–{last}" for first, last in runs]
    shown = texts if len(texts) <= 4 else [*texts[:2], "…", texts[-1]]
    return f"layer{'s' if len(indices) > 1 else ''} {', '.join(shown)}"


def tree_lines(model: Part) -> list[str]:
    """Returns the tree as lines of three columns: what it is, its axes and sizes, how many
    parameters that is.

    A module that is built as an earlier one says so in the place of its parts.
    """
    rows = list(_rows(model.parts, "", {}))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        f"{name:{widths[0]}}  {shape:{widths[1]}}  {number:>{widths[2]}}"
        for name, shape, number in rows
    ]


def _rows(
    parts: tuple[Part, ...], indent: str, seen: dict[tuple[Part, ...], str]
) -> Iterator[tuple[str, str, str]]:
    for part in parts:
        name, last = part.name, part is parts[-1]
        while len(part.parts) == 1 and part.times is None:
            name, part = f"{name}/{part.parts[0].name}", part.parts[0]
        says = " × ".join(
            f"{axis} {size:,}" for axis, size in zip(part.axes, part.shape, strict=True)
        )
        if part.times is not None and part.times > 1:
            says = f"{part.times} × {part.each:,}"
        deeper = part.parts
        if deeper in seen:
            says, deeper = f"{says}, each as layer {seen[deeper]}".removeprefix(", each "), ()
        elif part.times is not None:
            seen[deeper] = name.split()[1].partition("–")[0].removesuffix(",")
        yield f"{indent}{'└─ ' if last else '├─ '}{name}", says, f"{part.count:,}"
        yield from _rows(deeper, f"{indent}{'   ' if last else '│  '}", seen)


def active_parameters(config: ModelConfig, model: Part) -> int:
    """Returns the parameters less those of the experts that a token does not go to."""
    return sum(
        int(part.each * number * _share(config, part)) for _, part, number in model.parameters()
    )


def _share(config: ModelConfig, part: Part) -> Fraction:
    """Returns which share of a parameter a token meets."""
    if config.experts is None or "expert" not in part.axes:
        return Fraction(1)
    return Fraction(config.experts.experts_per_token, config.experts.num_experts)


def cache_numbers(config: ModelConfig) -> tuple[int, int]:
    """Returns the numbers that the KV cache holds for a token of the model, and for one of its
    encoder.
    """

    def size(slots: int, memory: int) -> int:
        segments = (
            jnp.ones((1, memory), jnp.int32) if config.structure == "encoder_decoder" else None
        )
        return count(
            jax.eval_shape(
                lambda: jax.tree.leaves(empty_cache(config, 1, slots, True, segments).layers)
            )
        )

    return size(1, 0), size(0, 1)

"""The parameters of a model as a tree of names, shapes and counts; no array is ever made."""

import dataclasses
import math
from collections.abc import Iterable, Iterator
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

# Modules before the layers and after all others; the rest keeps the order in which it is built.
_FIRST = ("embed", "encoder", "position_embed", "type_embed", "position_bias", "embed_norm")
_LAST = ("transform", "unembed", "logit_bias")
# The most runs of layers that are all written out: `layers 0–4, 6–10, …, 24–25` has more.
_MOST_RUNS = 4


@dataclasses.dataclass(frozen=True)
class ParameterNode:
    """A parameter, a module, or several layers with the same parameters.

    Attributes:
      name: of the module or parameter; of layers, their numbers.
      shape: of a parameter.
      axes: logical names of its axes.
      children: of a module.
      num_layers: how many layers this node is; None for what is no layer.
    """

    name: str
    shape: tuple[int, ...] = ()
    axes: tuple[str, ...] = ()
    children: tuple["ParameterNode", ...] = ()
    num_layers: int | None = None

    @property
    def count_each(self) -> int:
        """Parameters of the node, or of one of its layers."""
        if self.children:
            return sum(child.count for child in self.children)
        return math.prod(self.shape)

    @property
    def count(self) -> int:
        """Parameters of the node, of all its layers together."""
        return self.count_each * self.repeats

    @property
    def repeats(self) -> int:
        """How often the children are there: once for each layer."""
        return 1 if self.num_layers is None else self.num_layers

    def leaves(self, repeats: int = 1) -> Iterator[tuple[str, "ParameterNode", int]]:
        """Yields the path of each parameter, the parameter, and how often it is there."""
        repeats *= self.repeats
        if not self.children:
            yield self.name, self, repeats
        for child in self.children:
            for path, leaf, times in child.leaves(repeats):
                yield f"{self.name}/{path}", leaf, times

    def to_json(self) -> dict[str, Any]:
        """Returns the tree as JSON has it, counts included."""
        node: dict[str, Any] = {"name": self.name, "count": self.count}
        if self.num_layers is not None:
            node["num_layers"] = self.num_layers
            node["count_each"] = self.count_each
        if self.children:
            node["children"] = [child.to_json() for child in self.children]
        else:
            node["shape"] = list(self.shape)
            node["axes"] = list(self.axes)
        return node


def parameter_tree(config: ModelConfig) -> ParameterNode:
    """Returns the parameters of a model as a tree, layers of the same kind as one node.

    Only one layer of each kind is traced, so that a model of any size takes a second.
    """
    found: list[ParameterNode] = []

    def trace() -> Any:
        model = language_model(_shortened(config))
        params = model.init(jax.random.key(0))
        # The tree is made here: modules still have the order in which they are built, while what
        # `eval_shape` returns is sorted by name.
        modules = tuple(_stack(config, params))
        found.append(ParameterNode("model", children=modules))
        return params

    jax.eval_shape(trace)
    return found[0]


def _shortened(config: ModelConfig) -> ModelConfig:
    """Returns the model with its first layers and one layer of the pattern in each stack."""
    # The layers of a pattern all have the same parameters.
    num_layers = len(config.first_layers) + 1
    return dataclasses.replace(
        config,
        num_layers=min(config.num_layers, num_layers),
        encoder_layers=min(config.encoder_layers, num_layers),
        layer_loop="unroll",
    )


def _stack(config: ModelConfig, params: dict[str, Any]) -> Iterator[ParameterNode]:
    """Yields the modules of an encoder or decoder in the order in which they are applied."""
    for name in _present(_FIRST, params):
        if name == "encoder":
            modules = tuple(_stack(config.encoder(), params[name]))
            yield ParameterNode(name, children=modules)
        else:
            yield _node(name, params[name])

    for indices in layer_kinds(config).values():
        # All layers after the first ones are built as the one that was traced.
        traced = min(indices[0], len(config.first_layers))
        traced_params = params[layer_name(config, traced)]
        layer = _node(layers_name(indices), traced_params)
        yield dataclasses.replace(layer, num_layers=len(indices))

    for name in params:
        if "layers_" not in name and name not in (*_FIRST, *_LAST):
            yield _node(name, params[name])
    for name in _present(_LAST, params):
        yield _node(name, params[name])


def _present(names: Iterable[str], params: dict[str, Any]) -> list[str]:
    return [name for name in names if name in params]


def _node(name: str, value: Any) -> ParameterNode:
    if is_box(value):
        return ParameterNode(name, value.value.shape, value.names)
    children = tuple(_node(key, item) for key, item in value.items())
    return ParameterNode(name, children=children)


def layer_kinds(config: ModelConfig) -> dict[LayerConfig, list[int]]:
    """Returns the numbers of the layers with each config."""
    kinds: dict[LayerConfig, list[int]] = {}
    for index, layer in enumerate(config.layers()):
        kinds.setdefault(layer, []).append(index)
    return kinds


def layers_name(indices: list[int]) -> str:
    """Returns layers by their numbers, runs of them as one: `layers 0–4, 6–10, …, 24–25`."""
    texts = []
    for first, last in _runs(indices):
        text = str(first) if first == last else f"{first}–{last}"
        texts.append(text)
    if len(texts) > _MOST_RUNS:
        texts = [*texts[:2], "…", texts[-1]]

    noun = "layers" if len(indices) > 1 else "layer"
    numbers = ", ".join(texts)
    return f"{noun} {numbers}"


def _runs(indices: list[int]) -> list[tuple[int, int]]:
    """Returns the first and last of each run of numbers: [0, 1, 2, 5] -> [(0, 2), (5, 5)]."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        first = index
        if runs and runs[-1][1] == index - 1:
            # The run before continues.
            first, _ = runs.pop()
        runs.append((first, index))
    return runs


def tree_lines(model: ParameterNode) -> list[str]:
    """Returns the tree as lines of three columns: names, axes with sizes, counts.

    A module with the same parameters as an earlier layer refers to it.
    """
    rows = list(_rows(model.children, "", {}))
    name_width, shape_width, count_width = (
        max(len(row[column]) for row in rows) for column in range(3)
    )
    return [
        f"{name:{name_width}}  {shape:{shape_width}}  {count:>{count_width}}"
        for name, shape, count in rows
    ]


def _rows(
    nodes: tuple[ParameterNode, ...], indent: str, written: dict[tuple[ParameterNode, ...], str]
) -> Iterator[tuple[str, str, str]]:
    """Yields the three columns of each line.

    Args:
      nodes: siblings.
      indent: of their lines.
      written: the children of the layers written so far -> the number of the first such layer.
    """
    for node in nodes:
        branch = "└─ " if node is nodes[-1] else "├─ "
        below = "   " if node is nodes[-1] else "│  "
        name, node = _joined(node)
        text = _shape_text(node)
        children = node.children

        if children in written:
            reference = f"as layer {written[children]}"
            text = f"{text}, each {reference}" if text else reference
            children = ()
        elif node.num_layers is not None:
            # "layers 0–4, 6–10" -> "0"
            first = name.split()[1].partition("–")[0]
            written[children] = first.removesuffix(",")

        yield indent + branch + name, text, f"{node.count:,}"
        yield from _rows(children, indent + below, written)


def _joined(node: ParameterNode) -> tuple[str, ParameterNode]:
    """Returns a chain of modules with one child each as one path: `mlp_norm/scale`."""
    name = node.name
    while len(node.children) == 1 and node.num_layers is None:
        (node,) = node.children
        name = f"{name}/{node.name}"
    return name, node


def _shape_text(node: ParameterNode) -> str:
    if node.repeats > 1:
        return f"{node.repeats} × {node.count_each:,}"
    # ("embed", "mlp"), (4096, 14336) -> "embed 4,096 × mlp 14,336"
    sizes = []
    for axis, size in zip(node.axes, node.shape, strict=True):
        sizes.append(f"{axis} {size:,}")
    return " × ".join(sizes)


def active_parameters(config: ModelConfig, model: ParameterNode) -> int:
    """Returns how many parameters a token uses: all but those of the experts not chosen for it."""
    total = 0
    for _, leaf, repeats in model.leaves():
        share = _active_share(config, leaf)
        total += int(leaf.count_each * repeats * share)
    return total


def _active_share(config: ModelConfig, leaf: ParameterNode) -> Fraction:
    if config.experts is None or "expert" not in leaf.axes:
        return Fraction(1)
    return Fraction(config.experts.experts_per_token, config.experts.num_experts)


def cache_numbers(config: ModelConfig) -> tuple[int, int]:
    """Returns the numbers in the KV cache for one token, and for one token of the encoder."""
    return _cache_size(config, 1, 0), _cache_size(config, 0, 1)


def _cache_size(config: ModelConfig, slots: int, encoder_tokens: int) -> int:
    """Returns the numbers in a cache for one row of this many tokens."""
    segments = None
    if config.structure == "encoder_decoder":
        segments = jnp.ones((1, encoder_tokens), jnp.int32)

    def arrays() -> list[Any]:
        cache = empty_cache(config, 1, slots, True, segments)
        return jax.tree.leaves(cache.layers)

    return count(jax.eval_shape(arrays))

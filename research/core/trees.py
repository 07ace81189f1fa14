"""Nested dicts of arrays: names, counts."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax

T = TypeVar("T")


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a key path of `jax.tree_util` as `a/b/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of `tree` under their slash-separated names."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def nested(named: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    """Returns nested dicts of leaves under slash-separated names; the inverse of `named_leaves` for
    such trees.

    Args:
      named: leaves by name.
      separator: what stands between the parts of a name.
    """
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *groups, last = name.split(separator)
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[last] = leaf
    return tree


def count(tree: Any) -> int:
    """Returns the number of elements in all arrays (or shapes) of `tree`."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def node(static: tuple[str, ...]) -> Callable[[type[T]], type[T]]:
    """Makes a frozen dataclass a node of JAX trees whose fields are leaves, but for those named in
    `static`.

    A tree is rebuilt past `__init__` and its checks: JAX puts shapes, specs and placeholders where
    the arrays were.
    """

    def register(cls: type[T]) -> type[T]:
        names = [field.name for field in dataclasses.fields(cls)]
        leaves = tuple(name for name in names if name not in static)

        def flatten(value: T) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
            keyed = tuple((jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in leaves)
            return keyed, tuple(getattr(value, name) for name in static)

        def unflatten(values: tuple[Any, ...], children: tuple[Any, ...]) -> T:
            rebuilt = object.__new__(cls)
            for name, value in zip((*static, *leaves), (*values, *children), strict=True):
                object.__setattr__(rebuilt, name, value)
            return rebuilt

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return register

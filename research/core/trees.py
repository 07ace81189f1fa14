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
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def nested(named: Mapping[str, Any], separator: str = "/") -> dict[str, Any]:
    """Returns nested dicts of leaves under slash-separated names; the inverse of `named_leaves` for
    such trees.

    Args:
      named: leaves by name.
      separator: between the parts of a name.
    """
    # {"a/b": 1, "a/c": 2} -> {"a": {"b": 1, "c": 2}}
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *groups, last = name.split(separator)
        subtree = tree
        for group in groups:
            subtree = subtree.setdefault(group, {})
        subtree[last] = leaf
    return tree


def count(tree: Any) -> int:
    """Returns the number of elements in all arrays (or shapes) of `tree`."""
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(tree)]
    return sum(sizes)


def node(static: tuple[str, ...]) -> Callable[[type[T]], type[T]]:
    """Registers a frozen dataclass as a node of JAX trees: its fields are children, except those
    named in `static`.

    A tree is rebuilt without `__init__` and its checks, since JAX also rebuilds it with shapes,
    specs or placeholders in the place of arrays.
    """

    def register(cls: type[T]) -> type[T]:
        names = [field.name for field in dataclasses.fields(cls)]
        child_names = [name for name in names if name not in static]
        keys = [jax.tree_util.GetAttrKey(name) for name in child_names]

        def flatten(value: T) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
            # (("a", a), ("b", b)), (static value,)
            children = [getattr(value, name) for name in child_names]
            keyed_children = zip(keys, children, strict=True)
            static_values = [getattr(value, name) for name in static]
            return tuple(keyed_children), tuple(static_values)

        def unflatten(static_values: tuple[Any, ...], children: tuple[Any, ...]) -> T:
            rebuilt = object.__new__(cls)
            # A frozen dataclass forbids plain assignment.
            for name, value in zip(static, static_values, strict=True):
                object.__setattr__(rebuilt, name, value)
            for name, child in zip(child_names, children, strict=True):
                object.__setattr__(rebuilt, name, child)
            return rebuilt

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return register

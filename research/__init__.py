"""Tessera: a language model from raw text to a served assistant, in JAX and Flax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from research.api import convert, describe, load, train

__all__ = ["convert", "describe", "load", "train"]


def __getattr__(name: str) -> Any:
    """Imports `research.api` when one of its names is first used.

    Every module of the package imports this one first, and the command line makes settings before
    JAX is imported: so this module imports nothing.
    """
    if name not in __all__:
        raise AttributeError(f"module 'research' has no attribute {name!r}")
    from research import api

    return vars(api)[name]


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

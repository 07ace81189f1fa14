"""Types and shapes of every public function are checked under pytest only.

jaxtyping's import hook decorates every function with a check of shapes, which costs 50 µs a call.
Here only functions that take or return arrays have it; the types of others are checked in one or
two µs. Functions inside of functions have none: it would be made anew at each call of the outer
one, which takes a millisecond.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import beartype
import jaxtyping

T = TypeVar("T")
_jaxtyped = jaxtyping.jaxtyped
# What Python raises itself for a wrong type, and what code that reads foreign values expects.
_check_types = beartype.beartype(conf=beartype.BeartypeConf(violation_type=TypeError))


def install() -> None:
    """Checks what is imported of `research` from here on."""
    # What the hook decorates with.
    jaxtyping.jaxtyped = _jaxtyped_where_needed
    jaxtyping.install_import_hook("research", "beartype.beartype")


def _jaxtyped_where_needed(**how: Any) -> Callable[[T], T]:
    check_shapes = _jaxtyped(**how)

    def decorate(target: T) -> T:
        if "<locals>" in getattr(target, "__qualname__", ""):
            return target
        if inspect.isfunction(target):
            return check_shapes(target) if _needs_jaxtyping(target) else _check_types(target)
        if not dataclasses.is_dataclass(target):
            return check_shapes(target)
        if _needs_jaxtyping(target.__init__):
            return check_shapes(target)
        target.__init__ = _check_types(target.__init__)
        return target

    return decorate


def _needs_jaxtyping(function: Callable[..., Any]) -> bool:
    """Whether a function takes or returns arrays, or has a type that is only a name yet."""
    types = function.__annotations__.values()
    return any(isinstance(each, str) or "jaxtyping" in str(each) for each in types)

"""Types and shapes are checked under pytest only.

jaxtyping's import hook decorates every function with a check of shapes, which costs 50 µs a call,
and a millisecond more for a function inside of a function, at each call of the outer one. Here
only functions that take or return arrays have it. The types of others are checked in one or two µs;
those of functions inside of functions are not.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import beartype
import jaxtyping

_jaxtyped = jaxtyping.jaxtyped
# What Python raises itself for a wrong type, and what code that reads foreign values expects.
_check_types = beartype.beartype(conf=beartype.BeartypeConf(violation_type=TypeError))


def install() -> None:
    """Checks what is imported of `research` from here on."""
    # What the hook decorates with.
    jaxtyping.jaxtyped = jaxtyped_where_needed
    jaxtyping.install_import_hook("research", "beartype.beartype")


def jaxtyped_where_needed(*args: Any, **how: Any) -> Any:
    # Libraries may use it in other forms than the hook does.
    if args or "typechecker" not in how:
        return _jaxtyped(*args, **how)
    check_shapes = _jaxtyped(**how)

    def decorate(target: Any) -> Any:
        if inspect.isfunction(target):
            if _needs_jaxtyping(target):
                return check_shapes(target)
            is_inner = "<locals>" in target.__qualname__
            return target if is_inner else _check_types(target)
        if not dataclasses.is_dataclass(target) or _needs_jaxtyping(target.__init__):
            return check_shapes(target)
        target.__init__ = _check_types(target.__init__)
        return target

    return decorate


def _needs_jaxtyping(function: Callable[..., Any]) -> bool:
    """Whether a function takes or returns arrays, or has a type that is only a name yet."""
    types = function.__annotations__.values()
    return any(isinstance(each, str) or "jaxtyping" in str(each) for each in types)

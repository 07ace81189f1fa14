"""Calls functions of Optax and JAX that rely on implicit promotion, which this project's tests
forbid.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax


def promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of Optax or JAX that runs with implicit promotion of types and ranks.

    This project's own code writes its promotions down.
    """

    @functools.wraps(function)
    def promoted(*args: Any, **kwargs: Any) -> Any:
        # JAX's defaults.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return promoted

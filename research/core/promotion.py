"""Functions of Optax and JAX that mix types and ranks of arrays, where that is forbidden as in this
project's tests.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax


def promoting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function of Optax or JAX under the rules that it was written for: types and ranks
    are promoted.

    This project's own code writes its promotions down and needs none of it.
    """

    @functools.wraps(function)
    def promoted(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return function(*args, **kwargs)

    return promoted

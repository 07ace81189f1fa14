"""Aux-loss-free balancing of experts: the selection biases follow the expert load."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.trees import path_name


def selection_bias(path: str) -> str:
    """Returns the name of the selection bias of the experts at a path."""
    return f"{path}/selection_bias"


def balance_experts(
    params: Any, expert_load: Mapping[str, Float[Array, "*L E"]], speed: float
) -> Any:
    """Returns the parameters with each selection bias raised by `speed` below the mean load, and
    lowered above it.

    bias ← bias + speed · sign(mean load − load)

    Args:
      params: of a model; a selection bias that is not among them stays as it is.
      expert_load: how many tokens chose each expert, by the path of the experts' parameters; of the
        layers that the parameters have.
      speed: of the biases, whatever the optimizer and its rate.

    Source: Wang et al. 2024, arXiv:2408.15664, algorithm 1; DeepSeek-AI 2024, arXiv:2412.19437,
        section 2.1.2.
    """
    load_of = {selection_bias(path): load for path, load in expert_load.items()}

    def updated(path: tuple[Any, ...], leaf: Array) -> Array:
        name = path_name(path)
        if name not in load_of:
            return leaf
        load = load_of[name]
        # The parameter layers/experts/selection_bias [L, E] has the load of layers/experts [L, E].
        assert load.shape == leaf.shape, (name, load.shape, leaf.shape)

        # Loads [6, 2, 4] -> mean 4 -> the bias moves by speed · [-1, 1, 0]
        mean = load.mean(axis=-1, keepdims=True)
        below_mean = mean - load
        direction = jnp.sign(below_mean)
        return leaf + speed * direction

    return jax.tree_util.tree_map_with_path(updated, params)

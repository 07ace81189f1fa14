"""Which experts a token goes to, by numbers worked out by hand: claims about `models.router`."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from research.models.config import ExpertsConfig
from research.models.router import route

# Four groups of two experts. The sums of their scores are 1.0, 1.1, 0.9 and 0.55: the first two
# groups are the best, though the third has the second-best expert.
SCORES = np.array([0.9, 0.1, 0.6, 0.5, 0.7, 0.2, 0.3, 0.25], np.float32)
CONFIG = ExpertsConfig(
    num_experts=8,
    experts_per_token=2,
    hidden_dim=1,
    score="sigmoid",
    selection_bias=True,
    num_groups=4,
    groups_per_token=2,
    scale=2.5,
)


def routed(
    selection: list[float] | None, config: ExpertsConfig = CONFIG
) -> tuple[list[int], list[float]]:
    """The experts of a token with `SCORES`, and their weights."""
    logits = jnp.asarray(np.log(SCORES / (1 - SCORES)))[None, None]
    bias = None if selection is None else jnp.asarray(selection, jnp.float32)
    chosen, weights, _ = route(config, logits, bias, None)
    return chosen[0, 0].tolist(), weights[0, 0].tolist()


def test_experts_are_chosen_among_the_groups_with_the_best_two():
    chosen, weights = routed(None)
    assert chosen == [0, 2]
    assert weights == pytest.approx([2.5 * 0.9 / 1.5, 2.5 * 0.6 / 1.5])


def test_without_groups_the_best_experts_are_chosen():  # the control
    chosen, _ = routed(None, dataclasses.replace(CONFIG, num_groups=1, groups_per_token=1))
    assert chosen == [0, 4]


def test_a_selection_bias_chooses_groups_and_experts_and_weighs_none():
    chosen, weights = routed([0, 0, 0, 0, 0, 0, 1, 1])
    assert chosen == [6, 7]
    assert weights == pytest.approx([2.5 * 0.3 / 0.55, 2.5 * 0.25 / 0.55])
    # One that takes all scores below zero lets no expert of another group in.
    assert routed([-2.0] * 8) == routed(None)

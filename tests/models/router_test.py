"""Which experts a token goes to, by numbers worked out by hand: claims about `models.router`."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from research.models.config import ExpertsConfig
from research.models.reports import ExpertCounts
from research.models.router import count_experts, keep_within_capacity, route

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


def kept_by_a_loop(chosen: np.ndarray, real: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    """The choices that find a place: of each row, first choices before second, tokens in order."""
    kept = np.full_like(chosen, experts)
    for row in range(len(chosen)):
        taken = [0] * experts
        for rank in range(chosen.shape[2]):
            for token in range(chosen.shape[1]):
                expert = chosen[row, token, rank]
                if real[row, token] and taken[expert] < capacity:
                    taken[expert] += 1
                    kept[row, token, rank] = expert
    return kept


def test_choices_over_the_capacity_are_dropped_as_a_loop_over_tokens_drops_them():
    config = ExpertsConfig(4, 2, hidden_dim=1, capacity_factor=0.75)
    rng = np.random.default_rng(0)
    chosen = np.argsort(-rng.gumbel(size=(3, 10, 4)), axis=-1)[..., :2].astype(np.int32)
    real = np.arange(10)[None] < np.array([[10], [7], [4]])
    found = keep_within_capacity(config, jnp.asarray(chosen), jnp.asarray(real))
    # 0.75 · 10 tokens · 2 choices / 4 experts = 3.75
    expected = kept_by_a_loop(chosen, real, experts=4, capacity=4)
    np.testing.assert_array_equal(found, expected)
    dropped = (expected == 4) & real[..., None]
    assert 0 < dropped.sum() < real.sum() * 2

    logits = jnp.asarray(rng.normal(size=(3, 10, 4)), jnp.float32)
    counts = count_experts(config, logits, jnp.asarray(chosen), found, jnp.asarray(real))
    assert float(counts.tokens) == 21
    assert float(counts.dropped) == dropped.sum()
    np.testing.assert_array_equal(
        counts.load, [(chosen[real] == expert).sum() for expert in range(4)]
    )
    p = np.exp(logits)[real] / np.exp(logits)[real].sum(axis=-1, keepdims=True)
    assert counts.entropy == pytest.approx(-(p * np.log(p)).sum(), rel=1e-5)


def test_without_a_bound_every_choice_is_kept():  # the control
    config = ExpertsConfig(4, 2, hidden_dim=1)
    chosen = jnp.zeros((1, 10, 2), jnp.int32)
    assert keep_within_capacity(config, chosen, jnp.zeros((1, 10), bool)) is chosen


def test_metrics_of_stacked_layers_are_those_of_each_layer():
    counts = ExpertCounts(
        load=jnp.array([[6.0, 2.0], [4.0, 4.0]]),
        dropped=jnp.array([2.0, 0.0]),
        entropy=jnp.array([1.0, 3.0]),
        tokens=jnp.array([4.0, 4.0]),
    )
    assert counts.metrics("encoder/layers/mlp") == {
        "experts/encoder/layers_0/max_load": 1.5,
        "experts/encoder/layers_1/max_load": 1.0,
        "experts/encoder/layers_0/dropped": 0.25,
        "experts/encoder/layers_1/dropped": 0.0,
        "experts/encoder/layers_0/entropy": 0.25,
        "experts/encoder/layers_1/entropy": 0.75,
    }

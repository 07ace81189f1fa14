"""Held-out loss is one division of sums."""

import math

import jax.numpy as jnp
import pytest

from research.training.evaluation import evaluate
from research.training.gradients import Report
from research.training.step import make_eval_step


class ValueLoss:
    def weight(self, batch):
        return jnp.sum(batch["weights"])

    def sums(self, trainable, frozen, batch, key):
        assert key is None, "evaluation is deterministic"
        total = jnp.sum(batch["weights"] * batch["values"])
        return total, Report({"loss": total, "z_loss": 9.0 * total}, {}, {})


def batch(value: float, weight: float) -> dict:
    return {"values": jnp.full((2, 2), value), "weights": jnp.full((2, 2), weight)}


def test_mean_is_taken_over_all_tokens_and_not_over_batches():
    found = evaluate(
        make_eval_step(ValueLoss()),
        None,
        None,
        [batch(2.0, 1.0), batch(4.0, 0.25)],
        bytes_per_target=3.5,
    )
    mean = (2 * 4 + 4 * 1) / 5
    assert found["eval/loss"] == pytest.approx(mean)
    assert found["eval/bits_per_byte"] == pytest.approx(mean / math.log(2) / 3.5)
    # The control: the mean of the batches' means is another.
    assert abs(mean - (2 + 4) / 2) > 0.5


def test_light_tokens_weigh_as_much_as_heavy_ones():
    found = evaluate(
        make_eval_step(ValueLoss()), None, None, [batch(2.0, 1e-3)], bytes_per_target=1.0
    )
    assert found["eval/loss"] == pytest.approx(2.0)


def test_bits_per_byte_are_left_out_where_not_all_of_the_text_is_predicted():
    found = evaluate(
        make_eval_step(ValueLoss()), None, None, [batch(2.0, 1.0)], bytes_per_target=None
    )
    assert found.keys() == {"eval/loss"}

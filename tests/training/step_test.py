"""One training step: what it minimizes, what it skips, what it reports."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from research.core.random import key_for
from research.optim.optimizers import OptimConfig, build_optimizer
from research.optim.schedules import ScheduleConfig
from research.parallel.parameter import Axes
from research.training.gradients import Report, mean_gradients
from research.training.state import TrainState, new_state
from research.training.step import make_train_step

ROWS, LENGTH = 8, 4
AXES = {"w": Axes((), "scale"), "b": Axes((), "bias")}
FALLING = ScheduleConfig(name="linear", final_fraction=0.0)
PLAIN = {"weight_decay": 0.0, "beta1": 0.0}


class TokenLoss:
    """A loss of numbers in the place of a model; batches hold numbers where they usually hold
    ids.
    """

    def weight(self, batch: Any) -> jax.Array:
        return jnp.sum(batch["weights"])

    def sums(self, trainable: Any, frozen: Any, batch: Any, key: Any) -> tuple[jax.Array, Report]:
        total = self.total(trainable, batch, key)
        return total, Report({"loss": total}, {}, {})


class LineLoss(TokenLoss):
    """Weighted squares of a line's errors."""

    def total(self, params: Any, batch: Any, key: Any) -> jax.Array:
        error = params["w"] * batch["tokens"] + params["b"] - batch["targets"]
        return jnp.sum(batch["weights"] * error**2)


class RootLoss(TokenLoss):
    """Finite everywhere, with an infinite slope at 0."""

    def total(self, params: Any, batch: Any, key: Any) -> jax.Array:
        return jnp.sum(jnp.sqrt(jnp.abs(params["w"] * batch["tokens"]))) + params["b"]


class NoisyLoss(TokenLoss):
    def total(self, params: Any, batch: Any, key: Any) -> jax.Array:
        return (
            jnp.sum(params["w"] * jax.random.normal(key, batch["weights"].shape))
            + 0.0 * params["b"]
        )


class OffsetLoss(TokenLoss):
    """As large as the batch says, with a slope that does not depend on it."""

    def total(self, params: Any, batch: Any, key: Any) -> jax.Array:
        return params["w"] + params["b"] + jnp.sum(batch["targets"])


class MixedLoss(LineLoss):
    """Reads parameters of any type as float32."""

    def total(self, params: Any, batch: Any, key: Any) -> jax.Array:
        return super().total(
            {name: leaf.astype(jnp.float32) for name, leaf in params.items()}, batch, key
        )


class PairLoss(LineLoss):
    """Counts rows and not tokens; with a mean of each microbatch beside the sum, and a count of
    load.
    """

    def weight(self, batch: Any) -> jax.Array:
        return jnp.float32(batch["weights"].shape[0])

    def sums(self, trainable: Any, frozen: Any, batch: Any, key: Any) -> tuple[jax.Array, Report]:
        total, report = super().sums(trainable, frozen, batch, key)
        mean = jnp.mean(batch["tokens"]) * trainable["b"] * frozen["scale"]
        return total, Report(report.sums, {"mean": mean}, {})


LOSSES = {
    "line": LineLoss(),
    "root": RootLoss(),
    "noisy": NoisyLoss(),
    "offset": OffsetLoss(),
    "mixed": MixedLoss(),
    "pair": PairLoss(),
}


def numbers(seed: int = 0, weights: Any = None) -> dict[str, jax.Array]:
    rng = np.random.default_rng(seed)
    shape = (ROWS, LENGTH)
    return {
        "tokens": jnp.asarray(rng.normal(size=shape), jnp.float32),
        "targets": jnp.asarray(rng.normal(size=shape), jnp.float32),
        "weights": jnp.ones(shape) if weights is None else jnp.asarray(weights, jnp.float32),
        "positions": jnp.zeros(shape, jnp.int32),
        "segments": jnp.ones(shape, jnp.int32),
    }


def start(
    optimizer: optax.GradientTransformation, keep_ema: bool = False, w: float = 2.0
) -> TrainState:
    return new_state({"w": jnp.float32(w), "b": jnp.float32(-1.0)}, optimizer, keep_ema)


@functools.lru_cache
def stepper(name: str = "line", rate: float = 0.1, momentum: bool = False, **options) -> Any:
    """A compiled step without frozen parameters; its learning rate falls with the count of
    updates.
    """
    config = OptimConfig(
        name="adamw" if momentum else "sgd", learning_rate=rate, schedule=FALLING, **PLAIN
    )
    optimizer, learning_rate = build_optimizer(config, AXES, 10)
    accumulation = options.pop("accumulation", 1)
    gradients = functools.partial(mean_gradients, LOSSES[name], accumulation=accumulation)
    step = make_train_step(
        LOSSES[name], gradients, optimizer, learning_rate, key_for(0, "dropout"), **options
    )
    return jax.jit(lambda state, batch: step(state, {"scale": jnp.float32(3)}, batch)), optimizer


def by_hand(batch: Any, w: float = 2.0, b: float = -1.0) -> tuple[float, float, float]:
    """Mean loss and gradients by w and b of the line."""
    x, y, weights = (
        np.asarray(batch[name], np.float64) for name in ("tokens", "targets", "weights")
    )
    error, total = w * x + b - y, weights.sum()
    return (
        (weights * error**2).sum() / total,
        (2 * weights * error * x).sum() / total,
        (2 * weights * error).sum() / total,
    )


def assert_bits(a: Any, b: Any) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_step_goes_down_the_gradient_of_the_mean_over_weights():
    weights = np.random.default_rng(1).uniform(0, 2, (ROWS, LENGTH))
    batch = numbers(weights=weights)
    step, optimizer = stepper()
    state, metrics = step(start(optimizer), batch)
    loss, w, b = by_hand(batch)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(metrics["grad_norm"]) == pytest.approx(np.hypot(w, b), rel=1e-5)
    assert float(state.params["w"]) == pytest.approx(2 - 0.1 * w, rel=1e-5)
    assert float(state.params["b"]) == pytest.approx(-1 - 0.1 * b, rel=1e-5)
    assert int(state.step) == 1


def test_weights_count_against_each_other_alone():
    weights = np.random.default_rng(1).uniform(0, 2, (ROWS, LENGTH))
    step, optimizer = stepper()
    one, light = (step(start(optimizer), numbers(weights=scale * weights)) for scale in (1.0, 1e-3))
    # The weight is reported, for means over steps; nothing else depends on the scale.
    heavy_weight, light_weight = (float(metrics.pop("weight")) for _, metrics in (one, light))
    assert heavy_weight == pytest.approx(np.sum(weights), rel=1e-5)
    assert light_weight == pytest.approx(1e-3 * np.sum(weights), rel=1e-5)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(light), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5)


def test_tokens_of_weight_zero_and_padding_do_not_matter():
    weights = np.ones((ROWS, LENGTH))
    weights[3:] = 0
    batch = numbers(weights=weights)
    batch["segments"] = batch["segments"].at[5:].set(0)
    broken = {**batch, "targets": batch["targets"].at[3:].set(1e6)}
    step, optimizer = stepper()
    (one, metrics), (other, _) = step(start(optimizer), batch), step(start(optimizer), broken)
    assert_bits(one, other)
    # Rows without loss are tokens still; padding is none.
    assert metrics["tokens"] == 5 * LENGTH


def test_batch_without_any_weight_changes_nothing():
    step, optimizer = stepper()
    state, metrics = step(start(optimizer), numbers(weights=np.zeros((ROWS, LENGTH))))
    assert_bits(state.params, start(optimizer).params)
    assert metrics["loss"] == 0


@pytest.mark.parametrize(
    ("name", "w", "value"),
    [("line", 2.0, np.nan), ("line", 2.0, np.inf), ("line", 2.0, 1e30), ("root", 0.0, 1.0)],
    ids=["loss not a number", "loss infinite", "gradient overflows", "gradient alone infinite"],
)
def test_step_that_is_not_finite_is_skipped_and_changes_no_bit(name: str, w: float, value: float):
    step, optimizer = stepper(name, momentum=True, ema_decay=0.9, clip_norm=1.0)
    old = start(optimizer, keep_ema=True, w=w)
    batch = numbers()
    state, metrics = step(old, {**batch, "tokens": batch["tokens"].at[0, 0].set(value)})
    if name == "root":
        assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert_bits((state.params, state.opt_state, state.ema), (old.params, old.opt_state, old.ema))
    assert (int(state.step), int(state.skipped), int(state.skipped_in_row)) == (1, 1, 1)
    assert (metrics["skipped"], metrics["skipped_in_row"]) == (1, 1)


def test_step_whose_loss_alone_is_not_finite_is_skipped():
    step, optimizer = stepper("offset")
    old, batch = start(optimizer), numbers()
    state, metrics = step(old, {**batch, "targets": batch["targets"].at[0, 0].set(np.inf)})
    assert np.isinf(metrics["loss"])
    assert np.isfinite(metrics["grad_norm"])
    assert_bits(state.params, old.params)
    assert int(state.skipped) == 1
    # The control: the same slope is followed where the loss is finite.
    assert step(old, batch)[0].params["w"] != old.params["w"]


def test_skips_are_counted_and_the_row_of_them_ends_with_a_good_step():
    step, optimizer = stepper()
    good = numbers()
    bad = {**good, "tokens": good["tokens"] * jnp.nan}
    state, seen = start(optimizer), []
    for batch in (bad, good, bad, bad, good):
        state, metrics = step(state, batch)
        seen.append(
            (int(state.skipped), int(state.skipped_in_row), float(metrics["learning_rate"]))
        )
    # The rate in the log is the one that a good step would have had: skipped steps do not use the
    # schedule up.
    expected = [(1, 1, 0.1), (1, 0, 0.1), (2, 1, 0.09), (3, 2, 0.09), (3, 0, 0.09)]
    np.testing.assert_allclose(seen, expected, rtol=1e-6)
    assert int(state.step) == 5
    twice = step(step(start(optimizer), good)[0], good)[0]
    assert_bits(state.params, twice.params)


def test_clipping_bounds_the_norm_and_keeps_the_direction():
    batch = numbers()
    (free, optimizer), (clipped, _) = stepper(rate=1.0), stepper(rate=1.0, clip_norm=0.25)

    def moved(step: Any) -> np.ndarray:
        state, _ = step(start(optimizer), batch)
        return np.array([state.params["w"] - 2.0, state.params["b"] + 1.0])

    assert np.linalg.norm(moved(free)) > 1
    assert np.linalg.norm(moved(clipped)) == pytest.approx(0.25, rel=1e-5)
    direction = moved(free) / np.linalg.norm(moved(free))
    np.testing.assert_allclose(moved(clipped) / 0.25, direction, atol=1e-5)
    np.testing.assert_array_equal(moved(stepper(rate=1.0, clip_norm=1e3)[0]), moved(free))
    assert (
        clipped(start(optimizer), batch)[1]["grad_norm"]
        == free(start(optimizer), batch)[1]["grad_norm"]
    )


def test_parameters_of_two_types_have_one_norm_in_float32_and_keep_their_types():
    step, optimizer = stepper("mixed", momentum=True, clip_norm=0.25)
    first = new_state({"w": jnp.bfloat16(2.0), "b": jnp.float32(-1.0)}, optimizer, keep_ema=False)
    state, metrics = step(first, numbers())
    state, _ = step(state, numbers())
    assert [leaf.dtype for leaf in jax.tree.leaves(state)] == [
        leaf.dtype for leaf in jax.tree.leaves(first)
    ]
    _, w, b = by_hand(numbers())
    assert metrics["grad_norm"].dtype == jnp.float32
    assert float(metrics["grad_norm"]) == pytest.approx(
        np.hypot(float(jnp.bfloat16(w)), b), rel=1e-5
    )


def test_a_clipped_gradient_in_bfloat16_is_rounded_once():
    def gradient(**options: Any) -> tuple[Any, float]:
        step, optimizer = stepper("mixed", rate=1.0, **options)
        zero = new_state({"w": jnp.bfloat16(0.0), "b": jnp.float32(0.0)}, optimizer, keep_ema=False)
        state, metrics = step(zero, numbers())
        return -state.params["w"], float(metrics["grad_norm"])

    (free, norm), (clipped, _) = gradient(), gradient(clip_norm=0.17)
    assert clipped.dtype == jnp.bfloat16
    assert clipped == jnp.bfloat16(float(free) * 0.17 / norm)
    assert clipped != free * jnp.bfloat16(0.17 / norm)  # the control


def test_average_follows_its_formula_and_is_what_evaluation_reads():
    step, optimizer = stepper(ema_decay=0.75)
    state = start(optimizer, keep_ema=True)
    average = 2.0
    for seed in range(3):
        state, _ = step(state, numbers(seed))
        average = 0.75 * average + 0.25 * float(state.params["w"])
        assert float(state.ema["w"]) == pytest.approx(average, rel=1e-5)
    assert state.eval_params() is state.ema
    assert abs(float(state.ema["w"] - state.params["w"])) > 1e-3
    plain = start(optimizer)
    assert plain.eval_params() is plain.params


def uneven() -> dict[str, jax.Array]:
    """A batch whose every second row has no weight but for one token, so that microbatches weigh
    differently.
    """
    weights = np.ones((ROWS, LENGTH))
    weights[::2, 1:] = 0
    return numbers(weights=weights)


@pytest.mark.parametrize("count", [2, 4, 8])
@pytest.mark.parametrize("batch", [numbers(), uneven()], ids=["even", "uneven"])
def test_accumulated_gradients_equal_those_of_the_whole_batch(count: int, batch: Any):
    (whole, optimizer), (parts, _) = stepper(), stepper(accumulation=count)
    (one, a), (other, b) = whole(start(optimizer), batch), parts(start(optimizer), batch)
    for x, y in zip(jax.tree.leaves((one, a)), jax.tree.leaves((other, b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


def test_mean_of_microbatch_means_would_differ():
    batch = uneven()
    means = [by_hand({name: array[i::2] for name, array in batch.items()}) for i in range(2)]
    assert np.abs(np.mean(means, axis=0) - by_hand(batch)).max() > 0.05


@pytest.mark.parametrize("count", [1, 2])
def test_a_loss_has_its_own_denominator_and_means_beside_its_sum(count: int):
    batch = uneven()
    (step, optimizer), (loss, _, b) = stepper("pair", accumulation=count), by_hand(batch)
    _, metrics = step(start(optimizer), batch)
    tokens = float(batch["weights"].sum())
    assert float(metrics["loss"]) == pytest.approx(loss * tokens / ROWS, rel=1e-5)
    mean = float(jnp.mean(batch["tokens"]))
    assert float(metrics["mean"]) == pytest.approx(-3 * mean, rel=1e-4)
    # The mean is minimized with the sum, and the gradient goes to what is trained alone.
    _, w, _ = by_hand(batch)
    expected = np.hypot(w * tokens / ROWS, b * tokens / ROWS + 3 * mean)
    assert float(metrics["grad_norm"]) == pytest.approx(expected, rel=1e-5)


def test_microbatches_are_a_loop_unless_they_are_to_be_unrolled():
    def loops(**options: bool) -> int:
        optimizer, rate = optax.sgd(0.1), optax.constant_schedule(0.1)
        gradients = functools.partial(mean_gradients, LineLoss(), accumulation=2, **options)
        step = make_train_step(LineLoss(), gradients, optimizer, rate, key_for(0, "dropout"))
        return (
            jax.jit(step).lower(start(optimizer), {}, numbers()).as_text().count("stablehlo.while")
        )

    assert loops() == 1
    assert loops(unroll=True) == 0


def test_randomness_is_a_function_of_seed_and_step():
    step, optimizer = stepper("noisy")
    state = start(optimizer)
    batch = numbers()
    assert_bits(step(state, batch)[0], step(state, batch)[0])
    first, later = (
        step(state, batch)[1]["loss"],
        step(state.replace(step=jnp.int32(7)), batch)[1]["loss"],
    )
    assert abs(float(first - later)) > 1e-3
    loss = NoisyLoss()
    gradients = functools.partial(mean_gradients, loss)
    other = jax.jit(
        make_train_step(loss, gradients, optimizer, lambda step: 0.1, key_for(1, "dropout"))
    )
    assert abs(float(other(state, {}, batch)[1]["loss"] - first)) > 1e-3


def test_microbatches_draw_differently():
    step, optimizer = stepper("noisy", accumulation=2)
    halves = step(start(optimizer), numbers())[1]["loss"] * ROWS * LENGTH / 2.0
    keys = [jax.random.fold_in(jax.random.fold_in(key_for(0, "dropout"), 0), i) for i in range(2)]
    draws = [float(jnp.sum(jax.random.normal(key, (ROWS // 2, LENGTH)))) for key in keys]
    assert float(halves) == pytest.approx(sum(draws), rel=1e-4)
    assert abs(draws[0] - draws[1]) > 1e-3

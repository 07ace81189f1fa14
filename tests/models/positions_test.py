"""Positions against their closed forms."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.models.config import PositionConfig, RopeScalingConfig
from research.models.positions import alibi_slopes, rotate, rounded_alibi, sinusoidal
from research.models.rope_scaling import rotary_frequencies

ROTARY = PositionConfig(kind="rotary")


def test_sinusoidal_waves_have_their_closed_form():
    found = sinusoidal(jnp.array([[0, 1, 50]]), 6)
    expected = [
        [f(p / 10_000 ** (2 * i / 6)) for i in range(3) for f in (math.sin, math.cos)]
        for p in (0, 1, 50)
    ]
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    assert sinusoidal(jnp.array([[3]]), 5).shape == (1, 1, 5)
    halves = sinusoidal(jnp.array([[0, 1, 50]]), 6, halves=True)
    np.testing.assert_array_equal(halves, found[..., [0, 2, 4, 1, 3, 5]])


def rotated(vector: np.ndarray, position: int) -> np.ndarray:
    return np.asarray(
        rotate(ROTARY, jnp.asarray(vector)[None, None, None], jnp.array([[position]]))
    )[0, 0, 0]


@settings(deadline=None, max_examples=20)
@given(
    p=st.integers(0, 500), q=st.integers(0, 500), shift=st.integers(0, 500), seed=st.integers(0, 9)
)
def test_rotary_scores_depend_on_the_distance_alone(p: int, q: int, shift: int, seed: int):
    x, y = np.random.default_rng(seed).normal(size=(2, 8)).astype(np.float32)
    score, shifted = rotated(x, p) @ rotated(y, q), rotated(x, p + shift) @ rotated(y, q + shift)
    assert score == pytest.approx(shifted, abs=2e-3)
    assert np.linalg.norm(rotated(x, p)) == pytest.approx(np.linalg.norm(x), rel=1e-5)


def test_rotary_scores_change_with_the_distance():
    x, y = np.random.default_rng(0).normal(size=(2, 8)).astype(np.float32)
    assert abs(rotated(x, 3) @ rotated(y, 1) - rotated(x, 4) @ rotated(y, 1)) > 0.1


def test_rotary_rotates_pairs_of_halves_by_the_angle():
    found = rotated(np.array([1, 0, 0, 0], np.float32), 2)
    np.testing.assert_allclose(found, [math.cos(2), 0, math.sin(2), 0], atol=1e-6)
    found = rotated(np.array([0, 1, 0, 0], np.float32), 2)
    np.testing.assert_allclose(found, [0, math.cos(0.02), 0, math.sin(0.02)], atol=1e-6)


@pytest.mark.parametrize("kind", ["none", "learned", "sinusoidal", "alibi"])
def test_other_kinds_leave_queries_alone(kind: str):
    x = jnp.ones((1, 2, 1, 4))
    assert rotate(PositionConfig(kind=kind), x, jnp.array([[5, 6]])) is x


def test_llama3_scales_low_frequencies_and_keeps_high_ones():
    scaling = RopeScalingConfig("llama3", 8.0, 8192, 1.0, 4.0)
    plain = rotary_frequencies(PositionConfig(theta=500_000.0), 128)
    found = rotary_frequencies(PositionConfig(theta=500_000.0, scaling=scaling), 128)
    wavelengths = 2 * np.pi / plain
    short, long = wavelengths < 8192 / 4, wavelengths > 8192 / 1
    between = ~short & ~long
    assert min(short.sum(), long.sum(), between.sum()) > 3
    np.testing.assert_allclose(found[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(found[long], plain[long] / 8, rtol=1e-6)
    assert (found[between] < plain[between]).all()
    assert (found[between] > plain[between] / 8).all()
    assert (np.diff(found) < 0).all()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_a_document_of_the_original_length_is_not_scaled_and_one_token_more_is(kind: str):
    factors = (
        {"short_factors": (1.0, 1.2), "long_factors": (2.0, 3.0)}
        if kind == "longrope"
        else {"factor": 2.0}
    )
    scaling = RopeScalingConfig(kind=kind, original_length=6, **factors)
    config = PositionConfig(theta=100.0, scaling=scaling)
    x, positions = jnp.ones((1, 6, 1, 4)), jnp.arange(6)[None]

    def of_length(length: int) -> np.ndarray:
        return np.asarray(rotate(config, x, positions, jnp.full((1, 6), length)))

    np.testing.assert_array_equal(of_length(6), of_length(1))
    assert np.abs(of_length(7) - of_length(6)).max() > 0.1


def test_alibi_slopes_are_those_of_the_paper():
    eight = [2.0**-i for i in range(1, 9)]
    np.testing.assert_allclose(alibi_slopes(8), eight)
    np.testing.assert_allclose(
        alibi_slopes(12), [*eight, *[2.0 ** -(i + 0.5) for i in range(4)]], rtol=1e-6
    )
    np.testing.assert_allclose(alibi_slopes(1), [2.0**-8])


def test_rounded_alibi_is_what_its_rounding_makes_of_alibi():
    slopes, positions = alibi_slopes(12), np.arange(300)
    found = np.asarray(rounded_alibi(jnp.asarray(positions)[None], 12, 16))[0, :, 0]
    rounded = slopes.astype(jnp.bfloat16)[:, None] * positions.astype(jnp.bfloat16)
    np.testing.assert_array_equal(found, rounded.astype(np.float32) / 4)
    exact = slopes[:, None] * positions / 4
    np.testing.assert_allclose(found, exact, rtol=2**-6)
    assert np.abs(found - exact).max() > 0.1  # the control: what is near 50 is rounded to a quarter

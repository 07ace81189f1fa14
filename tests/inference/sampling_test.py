"""Penalties, truncation and draws against brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from research.core.errors import UserError
from research.core.random import keys_of
from research.inference.id_masks import pack_bits, pack_words, unpack_bits
from research.inference.sampling import (
    IdRules,
    apply_rules,
    draw,
    kth_largest,
    penalize,
    truncate,
)
from research.inference.sampling_config import SamplingConfig, SamplingParams

VOCAB = 12
ROWS = st.integers(0, 10_000).map(
    lambda seed: np.random.default_rng(seed).normal(size=VOCAB).astype(np.float32) * 2
)


cut = jax.jit(truncate)


def kept(logits: np.ndarray, **fields) -> set[int]:
    """Ids that survive the truncation; what survives keeps its logit."""
    found = np.asarray(cut(logits[None], SamplingParams.of([SamplingConfig(**fields)])))[0]
    alive = np.isfinite(found)
    np.testing.assert_array_equal(found[alive], logits[alive])
    assert (found[~alive] == -np.inf).all()
    return set(np.flatnonzero(alive).tolist())


def softmax(logits: np.ndarray) -> np.ndarray:
    p = np.exp(logits.astype(np.float64) - logits.max())
    return p / p.sum()


def nucleus(probabilities: np.ndarray, top_p: float) -> set[int]:
    """The fewest likeliest ids that reach `top_p`, one by one."""
    chosen, total = set(), 0.0
    for i in np.argsort(-probabilities):
        chosen.add(int(i))
        total += probabilities[i]
        assume(abs(total - top_p) > 1e-5)
        if total >= top_p:
            break
    return chosen


@settings(deadline=None, max_examples=30)
@given(ROWS, st.integers(0, VOCAB + 2))
def test_top_k_keeps_the_likeliest(logits: np.ndarray, k: int):
    assert kept(logits, top_k=k) == set(np.argsort(-logits)[: k or VOCAB].tolist())


@settings(deadline=None, max_examples=30)
@given(ROWS, st.floats(0.01, 0.999))
def test_top_p_keeps_the_fewest_that_reach_it(logits: np.ndarray, p: float):
    assert kept(logits, top_p=p) == nucleus(softmax(logits), p)


@settings(deadline=None, max_examples=30)
@given(ROWS, st.floats(0.01, 1.0))
def test_min_p_keeps_a_fraction_of_the_likeliest(logits: np.ndarray, p: float):
    ratio = softmax(logits) / softmax(logits).max()
    assume((np.abs(ratio - p) > 1e-5)[ratio < 1].all())
    assert kept(logits, min_p=p) == set(np.flatnonzero(ratio >= p).tolist())


@settings(deadline=None, max_examples=30)
@given(ROWS, st.integers(1, VOCAB), st.floats(0.01, 0.999))
def test_top_p_is_taken_of_what_top_k_leaves(logits: np.ndarray, k: int, p: float):
    left = np.where(logits >= np.sort(logits)[-k], logits, -np.inf)
    assert kept(logits, top_k=k, top_p=p) == nucleus(softmax(left), p) & set(
        np.flatnonzero(left > -np.inf).tolist()
    )


def test_top_p_that_is_reached_exactly_takes_no_further_token():
    # Halves of each other, down to the last bit: the logit whose exponential is rounded to 1/2.
    near = (
        np.float32(np.log(0.5)) + np.arange(-4, 5, dtype=np.float32) * np.finfo(np.float32).epsneg
    )
    rows = [np.array([0.0, x, x], np.float32) for x in near]
    logits = next(
        row for row in rows if np.asarray(jax.nn.softmax(row)).tolist() == [0.5, 0.25, 0.25]
    )
    assert kept(logits, top_p=0.5) == {0}
    assert kept(logits, top_p=float(np.nextafter(np.float32(0.5), np.float32(1)))) == {0, 1, 2}


def typical(probabilities: np.ndarray, mass: float) -> set[int]:
    """The fewest ids that reach a mass, nearest to the entropy first, one by one."""
    surprise = -np.log(probabilities)
    distance = np.abs(surprise - (probabilities * surprise).sum())
    chosen, total = set(), 0.0
    for i in np.argsort(distance):
        chosen.add(int(i))
        total += probabilities[i]
        assume(abs(total - mass) > 1e-5)
        if total >= mass:
            break
    return chosen


@settings(deadline=None, max_examples=30)
@given(ROWS, st.floats(0.01, 0.999))
def test_typical_keeps_the_fewest_of_usual_surprise(logits: np.ndarray, mass: float):
    wanted = typical(softmax(logits), mass)
    assert kept(logits, typical_p=mass) == wanted


def test_typical_may_leave_out_the_likeliest():
    logits = np.log(np.array([0.4] + [0.06] * 10, np.float32))
    assert kept(logits, typical_p=0.5) == set(range(1, 11))
    assert kept(logits, top_p=0.3) == {0}  # the control


@settings(deadline=None, max_examples=30)
@given(ROWS, st.integers(2, VOCAB), st.floats(0.05, 0.9), st.floats(0.05, 0.999))
def test_typical_is_taken_of_what_the_others_leave(
    logits: np.ndarray, k: int, min_p: float, mass: float
):
    ratio = softmax(logits) / softmax(logits).max()
    assume((np.abs(ratio - min_p) > 1e-5)[ratio < 1].all())
    left = np.flatnonzero((logits >= np.sort(logits)[-k]) & (ratio >= min_p))
    wanted = {int(left[i]) for i in typical(softmax(logits[left]), mass)}
    assert kept(logits, top_k=k, min_p=min_p, typical_p=mass) == wanted


def test_ties_at_the_cut_stay():
    logits = np.array([1.0, 2.0, 1.0, 0.0, 1.0], np.float32)
    assert kept(logits, top_k=2) == kept(logits, top_p=0.5) == {0, 1, 2, 4}


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, VOCAB))
def test_the_kth_largest_is_that_of_a_sort(seed: int, k: int):
    rng = np.random.default_rng(seed)
    rows = np.asarray(rng.normal(size=(3, VOCAB)) * 10.0 ** rng.integers(-30, 30), np.float32)
    rows[rng.random(rows.shape) < 0.3] = rng.choice([0.0, 1.0, -np.inf])
    found = jax.jit(kth_largest)(rows, np.array([k, 1, VOCAB], np.int32))
    ordered = -np.sort(-rows, axis=1)
    np.testing.assert_array_equal(found, [ordered[0, k - 1], ordered[1, 0], ordered[2, -1]])


def test_rows_are_cut_by_settings_of_their_own():
    rows = np.random.default_rng(0).normal(size=(5, VOCAB)).astype(np.float32) * 2
    configs = [
        SamplingConfig(),
        SamplingConfig(top_k=3),
        SamplingConfig(top_p=0.7),
        SamplingConfig(min_p=0.2),
        SamplingConfig(top_k=5, top_p=0.9, min_p=0.1),
    ]
    together = cut(rows, SamplingParams.of(configs))
    for row, config, found in zip(rows, configs, together, strict=True):
        np.testing.assert_array_equal(found, cut(row[None], SamplingParams.of([config]))[0])
    assert (
        len({int(np.isfinite(row).sum()) for row in together}) > 3
    )  # the control: they are cut differently


def test_the_likeliest_always_stays():
    logits = np.array([0.0, 5.0, 1.0], np.float32)
    assert kept(logits, top_k=1, top_p=1e-6, min_p=1.0) == {1}


@pytest.mark.parametrize("p", [1e-30, 1e-39, 1e-46])
def test_the_likeliest_stays_at_a_top_p_that_float32_rounds_to_zero(p: float):
    assert kept(LOGITS, top_p=p) == {3}
    assert set(np.asarray(draws(LOGITS, NONE_SEEN, SamplingConfig(top_p=p), 16))) == {3}


def test_a_row_without_top_p_is_bitwise_untouched_beside_one_with_it():
    # The first token's probability is 1 in float32, so the sum before each of the others is not
    # below a top_p of 1.
    logits = np.full((2, 50_000), -40.0, np.float32)
    logits[:, 7] = 0.0
    found = np.asarray(
        cut(logits, SamplingParams.of([SamplingConfig(), SamplingConfig(top_p=0.5)]))
    )
    assert found[0].tobytes() == logits[0].tobytes()
    assert np.flatnonzero(np.isfinite(found[1])).tolist() == [7]


def test_penalty_lowers_seen_tokens_of_either_sign():
    logits, seen = jnp.array([[2.0, -2.0, 2.0, 0.0]]), jnp.array([[True, True, False, True]])
    np.testing.assert_allclose(penalize(logits, seen, jnp.array([1.25])), [[1.6, -2.5, 2.0, 0.0]])


def rules_of(rows: int, vocab: int, **changes) -> IdRules:
    """Rules of all rows alike."""
    same = {
        name: jnp.broadcast_to(jnp.asarray(x), (rows, *np.shape(x))) for name, x in changes.items()
    }
    return IdRules.none(rows, vocab).replace(**same)


def edited(config: SamplingConfig, position: int = 0, **changes) -> np.ndarray:
    """The logits 1, 2, 3, 4 after the rules."""
    logits, params = jnp.array([[1.0, 2.0, 3.0, 4.0]]), SamplingParams.of([config])
    found = jax.jit(apply_rules)(logits, rules_of(1, 4, **changes), jnp.array([position]), params)
    return np.asarray(found)[0]


def test_presence_and_frequency_are_of_the_answer_alone():
    had = {"in_prompt": np.array([True] * 4), "counts": np.array([0, 1, 3, 0], np.int32)}
    found = edited(SamplingConfig(presence_penalty=0.5), **had)
    np.testing.assert_allclose(found, [1, 1.5, 2.5, 4])
    found = edited(SamplingConfig(frequency_penalty=0.5), **had)
    np.testing.assert_allclose(found, [1, 1.5, 1.5, 4])
    found = edited(SamplingConfig(repetition_penalty=2.0), **had)
    np.testing.assert_allclose(found, [0.5, 1, 1.5, 2])


def test_repetition_comes_before_frequency_and_bias():
    had = {"counts": np.array([0, 2, 0, 0], np.int32), "bias": np.array([0, 1, 0, -3], np.float32)}
    config = SamplingConfig(repetition_penalty=2.0, frequency_penalty=0.25, presence_penalty=0.125)
    np.testing.assert_allclose(edited(config, **had), [1, 2 / 2 - 2 * 0.25 - 0.125 + 1, 3, 1])


def test_no_text_ends_before_its_first_end():
    ends = {"is_end": np.array([False, True, False, True]), "first_end": np.int32(7)}
    early, late = (edited(SamplingConfig(), position, **ends) for position in (6, 7))
    np.testing.assert_array_equal(early, [1, -np.inf, 3, -np.inf])
    np.testing.assert_array_equal(late, [1, 2, 3, 4])


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 100), st.integers(0, 10_000))
def test_masks_are_packed_as_they_are_unpacked(count: int, seed: int):
    bits = np.random.default_rng(seed).random((2, count)) < 0.5
    words = pack_bits(jnp.asarray(bits))
    np.testing.assert_array_equal(unpack_bits(words, count), bits)
    np.testing.assert_array_equal(np.stack([pack_words(row) for row in bits]), words)


def test_an_id_that_is_not_allowed_is_not_drawn():
    allowed = pack_words(np.array([True, True, False, False, True]))
    found = draws(LOGITS, NONE_SEEN, SamplingConfig(), 200, allowed=allowed)
    assert set(np.asarray(found)) == {0, 1, 4}


draw_rows = jax.jit(draw)


def draws(
    logits: np.ndarray, seen: np.ndarray, config: SamplingConfig, count: int, **changes
) -> jax.Array:
    """Many draws of one sequence, at one position after the other."""
    rules = rules_of(count, len(logits), in_prompt=seen, **changes)
    rows = np.broadcast_to(logits, (count, *logits.shape))
    return draw_rows(
        rows, rules, keys_of([0] * count), jnp.arange(count), SamplingParams.of([config] * count)
    )


def test_keys_are_those_of_the_seeds():
    seeds = [0, 1, 12345, 2**31 - 1]
    expected = [jax.random.key_data(jax.random.key(seed)) for seed in seeds]
    np.testing.assert_array_equal(jax.random.key_data(keys_of(seeds)), expected)
    wide = np.asarray(jax.random.key_data(keys_of([2**31, 2**32 + 7, 2**64 - 1]))).tolist()
    assert wide == [[0, 2**31], [1, 7], [2**32 - 1, 2**32 - 1]]


LOGITS = np.array([1.0, 0.5, -0.5, 2.0, 0.0], np.float32)
NONE_SEEN = np.zeros(5, bool)


def test_greedy_takes_the_likeliest():
    assert set(np.asarray(draws(LOGITS, NONE_SEEN, SamplingConfig(temperature=0.0), 16))) == {3}
    penalized = SamplingConfig(temperature=0.0, repetition_penalty=4.0)
    assert set(np.asarray(draws(LOGITS, np.arange(5) == 3, penalized, 16))) == {0}


@pytest.mark.parametrize(("penalty", "likeliest"), [(1e-30, 0), (1e30, 3)])
@pytest.mark.parametrize("shift", [0.0, -100.0])
def test_the_outermost_penalties_keep_logits_finite(penalty: float, likeliest: int, shift: float):
    seen, config = np.arange(5) < 2, SamplingConfig(temperature=0.0, repetition_penalty=penalty)
    logits, penalties = LOGITS + np.float32(shift), SamplingParams.of([config]).repetition_penalty
    assert np.isfinite(
        penalize(jnp.asarray(logits[None]), jnp.asarray(seen[None]), penalties)
    ).all()
    assert set(np.asarray(draws(logits, seen, config, 4))) == {likeliest}


@pytest.mark.parametrize("temperature", [1e-3, 1e-37, 1e-39, 1e-50])
def test_low_temperature_tends_to_greedy(temperature: float):
    config = SamplingConfig(temperature=temperature, top_p=0.9)
    assert set(np.asarray(draws(LOGITS, NONE_SEEN, config, 64))) == {3}
    assert len(set(np.asarray(draws(LOGITS, NONE_SEEN, SamplingConfig(), 64)))) > 2


def p_value(temperature: float, expected: np.ndarray) -> float:
    found = np.bincount(
        np.asarray(draws(LOGITS, NONE_SEEN, SamplingConfig(temperature=temperature), 4000)),
        minlength=5,
    )
    return scipy.stats.chisquare(found, 4000 * expected).pvalue


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_draws_follow_the_softmax(temperature: float):
    assert p_value(temperature, softmax(LOGITS / temperature)) > 0.001


def test_draws_do_not_follow_another_softmax():
    assert p_value(1.0, softmax(LOGITS / 1.2)) < 1e-6


def test_draws_stay_among_what_is_kept():
    found = np.asarray(draws(LOGITS, NONE_SEEN, SamplingConfig(top_k=2), 200))
    assert set(found) == {0, 3}


def test_draw_of_a_sequence_depends_on_its_key_and_position_alone():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(3, 50)), jnp.float32)
    keys, positions = jax.vmap(jax.random.key)(jnp.arange(3)), jnp.array([4, 9, 2])
    seen = IdRules.none(3, 50)
    plain = SamplingParams.of([SamplingConfig()])
    three = SamplingParams.of([SamplingConfig()] * 3)
    together = draw(logits, seen, keys, positions, three)
    for i in range(3):
        one = slice(i, i + 1)
        alone = draw(logits[one], IdRules.none(1, 50), keys[one], positions[one], plain)
        assert alone[0] == together[i]
    same = jnp.broadcast_to(logits[:1], (3, 50))
    elsewhere = [draw(same, seen, keys, positions + shift, three).tolist() for shift in range(4)]
    assert len({tuple(row) for row in elsewhere}) > 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("top_k", -1),
        ("top_p", 0.0),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e39),
        ("repetition_penalty", 1e-46),
        ("repetition_penalty", float("nan")),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", ("a", "")),
        ("min_tokens", 129),
        ("typical_p", 0.0),
        ("presence_penalty", float("inf")),
        ("frequency_penalty", float("nan")),
        ("logit_bias", ((3, 1e31),)),
    ],
)
def test_impossible_value_is_refused(field: str, value):
    with pytest.raises(UserError) as caught:
        SamplingConfig(**{field: value})
    assert str(caught.value).startswith(f"{field} = {value} must ")


def test_a_bias_that_is_no_number_is_refused_by_its_place():
    with pytest.raises(UserError, match=r"logit_bias\.1\.1 = nan must be a finite number"):
        SamplingConfig(logit_bias=((2, 1.0), (3, float("nan"))))

"""How often guesses are kept, against enumeration, draws and the engine's own guesses."""

import dataclasses

import numpy as np
import pytest

from research.bench.acceptance import (
    Acceptance,
    Text,
    mean_of,
    of_first_layers,
    of_lookup,
    of_model,
    of_mtp,
    rejection,
    same_noise,
)
from tests.models.variants import VARIANTS
from tests.tiny import logits, random_params, random_tokens, tiny_config

P = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.25, 0.75, 0.0], [1.0, 0.0, 0.0]])
Q = np.array([[0.2, 0.3, 0.5], [0.1, 0.1, 0.8], [0.0, 0.5, 0.5], [0.0, 1.0, 0.0]])


def test_rejection_sampling_keeps_what_both_have():
    np.testing.assert_allclose(rejection(P, Q), [0.7, 1.0, 0.5, 0.0])


def test_rejection_is_what_its_algorithm_keeps_when_all_cases_are_enumerated():
    for p, q in zip(P, Q, strict=True):
        # A guess i is drawn with q_i, and kept with min(1, p_i / q_i).
        kept = sum(q[i] * min(1.0, p[i] / q[i]) for i in range(3) if q[i])
        assert kept == pytest.approx(rejection(p[None], q[None])[0])


def test_the_same_noise_is_the_formula_by_every_pair():
    for p, q in zip(P, Q, strict=True):
        expected = 0.0
        for i in range(3):
            if p[i] and q[i]:
                expected += 1 / sum(max(p[j] / p[i], q[j] / q[i]) for j in range(3))
        assert same_noise(p[None], q[None])[0] == pytest.approx(expected)


def test_the_same_noise_is_how_often_draws_agree():
    noise = np.random.default_rng(0).gumbel(size=(200_000, 3))
    with np.errstate(divide="ignore"):
        for p, q in zip(P, Q, strict=True):
            ours = np.argmax(np.log(p) + noise, axis=1)
            guessed = np.argmax(np.log(q) + noise, axis=1)
            agreed = np.mean(ours == guessed)
            # Four standard deviations.
            assert agreed == pytest.approx(same_noise(p[None], q[None])[0], abs=0.005)


def test_no_way_keeps_more_than_rejection_sampling():
    random = np.random.default_rng(1)
    p = random.dirichlet(np.ones(20), 50)
    q = random.dirichlet(np.ones(20), 50)
    assert np.all(same_noise(p, q) <= rejection(p, q))
    # And at least half of it: 1 - d over 1 + d, where d is the distance.
    assert np.all(same_noise(p, q) >= rejection(p, q) / (2 - rejection(p, q)) - 1e-9)


def test_distributions_are_those_of_the_tokens_before():
    config = tiny_config()
    params = random_params(config)
    ids = random_tokens(1, 9)
    found = of_model(config, params, Text(tuple(ids[0].tolist()), 4), 0.5)
    scaled = np.asarray(logits(config, params, ids))[0, 3:8].astype(np.float64) / 0.5
    expected = np.exp(scaled) / np.exp(scaled).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_all_of_the_first_layers_are_the_model_and_fewer_are_not():
    config = tiny_config()
    params = random_params(config)
    text = Text(tuple(random_tokens(1, 9)[0].tolist()), 4)
    whole = of_model(config, params, text, 1.0)
    np.testing.assert_array_equal(of_first_layers(config, params, 2, text, 1.0), whole)
    assert np.abs(of_first_layers(config, params, 1, text, 1.0) - whole).max() > 0.01


def test_multi_token_prediction_does_not_see_the_token_that_it_guesses():
    config = dataclasses.replace(VARIANTS["multi-token prediction"])
    params = random_params(config)
    ids = random_tokens(1, 9)[0].tolist()
    found = of_mtp(config, params, Text(tuple(ids), 4), 1.0)
    assert found.shape == (5, config.vocab_size)
    # Other tokens from place 6 on change what is guessed for the places after it alone.
    others = of_mtp(config, params, Text((*ids[:6], 1, 2, 3), 4), 1.0)
    np.testing.assert_allclose(found[:3], others[:3], rtol=1e-5)
    assert np.abs(found[3:] - others[3:]).max() > 1e-3


def test_lookup_is_kept_with_the_probability_of_its_guess():
    # After 5 6 7 5 6 comes 7, by the text before.
    text = Text((5, 6, 7, 5, 6, 7), 5)
    p = np.full((1, 10), 0.05)
    p[0, 7] = 0.55
    assert of_lookup(p, text) == Acceptance(pytest.approx(0.55), pytest.approx(0.55), 1)
    assert of_lookup(p, Text((1, 2, 3, 4, 5, 6), 5)) is None


def test_means_go_by_guesses():
    found = mean_of([Acceptance(0.5, 1.0, 1), Acceptance(0.1, 0.2, 3)])
    assert found == Acceptance(pytest.approx(0.2), pytest.approx(0.4), 4)

"""Masked and prefix examples, against what a plain reading of them gives."""

import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data.objectives import MaskedConfig
from tests.data.objectives.examples import (
    Segment,
    drawn,
    epoch,
    objective_of,
    packed,
    segments,
    text_of,
)
from tests.data.text import BOS, EOS, MASK, VOCAB, store

LENGTHS = st.lists(st.integers(0, 60), min_size=1, max_size=30).filter(any)


def check_masked(segment: Segment) -> None:
    """Framed, in order; shown as it is where it has no weight; the hidden are as many as they
    should be.
    """
    assert (segment.targets[0], segment.targets[-1]) == (BOS, EOS)
    inner = segment.targets[1:-1]
    assert inner == list(range(inner[0], inner[0] + len(inner)))
    assert segment.weights[0] == segment.weights[-1] == 0
    assert sum(segment.weights) == max(1, round(0.15 * len(inner)))
    assert all(
        t == g
        for t, g, w in zip(segment.tokens, segment.targets, segment.weights, strict=True)
        if not w
    )


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, width=st.integers(3, 40), seed=st.integers(0, 2**40))
def test_every_token_is_in_one_masked_piece_and_only_hidden_ones_are_changed(lengths, width, seed):
    corpus = store(lengths)
    seen = []
    for segment in segments(epoch(packed(corpus, objective_of("masked", width), seed))):
        check_masked(segment)
        seen += segment.targets[1:-1]
    assert sorted(seen) == text_of(corpus)


def test_a_changed_token_without_weight_is_noticed():  # the control
    segment = next(segments(epoch(packed(store([30]), objective_of("masked", 40)))))
    check_masked(segment)
    index = segment.weights.index(0, 1)
    segment.tokens[index] += 1
    with pytest.raises(AssertionError):
        check_masked(segment)


def test_hidden_tokens_are_treated_in_their_shares():
    rows = packed(store([500] * 80), objective_of("masked", 512))
    counts, total = collections.Counter(), 0
    for segment in segments(epoch(rows)):
        for token, target, weight in zip(
            segment.tokens, segment.targets, segment.weights, strict=True
        ):
            if weight:
                counts["mask" if token == MASK else "kept" if token == target else "random"] += 1
                total += 1
    assert total == 80 * 75
    for name, share in (("mask", 0.8), ("random", 0.1), ("kept", 0.1)):
        assert abs(counts[name] / total - share) < 4 * (share * (1 - share) / total) ** 0.5, name


def test_random_tokens_are_spread_over_the_vocabulary_and_shares_are_the_config():
    config = MaskedConfig(density=0.5, mask=0.0, random=1.0)
    batch = epoch(packed(store([400] * 50), objective_of("masked", 402, masked=config)))
    shown = batch["tokens"][batch["weights"] > 0]
    assert len(shown) == 50 * 200
    assert not (shown == MASK).any()
    assert abs(shown.mean() / VOCAB - 0.5) < 4 * 12**-0.5 / 100
    assert shown.max() > 0.99 * VOCAB


def test_every_position_is_hidden_equally_often_and_each_epoch_hides_others():
    rows = packed(store([20]), objective_of("masked", 22))
    hidden = drawn(rows, 4000)["weights"]
    assert (hidden.sum(axis=1) == 3).all()
    assert (hidden[:, [0, -1]] == 0).all()
    share = hidden[:, 1:-1].mean(axis=0)
    assert np.abs(share - 0.15).max() < 4.5 * (0.15 * 0.85 / 4000) ** 0.5
    # Pairs of positions as well: 3 of 20 hide each pair in 3 · 2 / (20 · 19) of the epochs.
    together = hidden[:, 1:-1].T @ hidden[:, 1:-1] / 4000
    expected = 6 / 380
    off = ~np.eye(20, dtype=bool)
    assert np.abs(together[off] - expected).max() < 5 * (expected / 4000) ** 0.5


def check_prefix(segment: Segment) -> None:
    """One run of a document; the prefix is its beginning; weights begin with the pair that leaves
    the prefix.
    """
    p, n = sum(segment.prefix), len(segment.tokens)
    assert 1 <= p <= n
    assert segment.prefix == [1] * p + [0] * (n - p)
    assert segment.weights == [0.0] * (p - 1) + [1.0] * (n - p + 1)
    seen = set(segment.tokens[:p])
    assert not seen & {
        target for target, weight in zip(segment.targets, segment.weights, strict=True) if weight
    }


@settings(max_examples=40, deadline=None)
@given(lengths=LENGTHS, width=st.integers(1, 40), seed=st.integers(0, 2**40))
def test_a_prefix_piece_predicts_nothing_that_it_sees(lengths, width, seed):
    corpus = store(lengths)
    rows, causal = (
        packed(corpus, objective_of(kind, width), seed) for kind in ("prefix", "causal")
    )
    batch = epoch(rows)
    assert batch["prefix"].dtype == np.int32
    for segment in segments(batch):
        check_prefix(segment)
    for name in ("tokens", "targets", "positions", "segments"):  # packed as causal rows are
        np.testing.assert_array_equal(batch[name], epoch(causal)[name])


def test_a_weight_inside_the_prefix_is_noticed():  # the control
    found = list(segments(epoch(packed(store([30] * 9), objective_of("prefix", 40)))))
    segment = next(segment for segment in found if sum(segment.prefix) > 1)
    segment.weights[sum(segment.prefix) - 2] = 1.0
    with pytest.raises(AssertionError):
        check_prefix(segment)


def test_every_length_of_a_prefix_is_equally_likely():
    rows = packed(store([9]), objective_of("prefix", 10))
    counts = np.bincount(drawn(rows, 2700)["prefix"].sum(axis=1), minlength=11)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 270).max() < 4.5 * 243**0.5

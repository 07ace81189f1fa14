"""Draws without a state: fixed for ever, even, and each group by itself."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from research.data.draws import below, choose, fraction, hash64, shuffled

MASK = 2**64 - 1


def splitmix(z: int) -> int:
    """The finalizer in plain integers."""
    z = z * 0x9E3779B97F4A7C15 & MASK
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ z >> 27) * 0x94D049BB133111EB & MASK
    return z ^ z >> 31


@settings(max_examples=50, deadline=None)
@given(
    value=st.integers(0, 2**40), salts=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=3)
)
def test_draws_are_those_of_plain_integers(value, salts):
    expected = value + 1
    for salt in salts:
        expected = splitmix(expected ^ salt)
    assert int(hash64(np.array([value]), *salts)[0]) == expected
    assert (
        int(hash64(np.array([value]), *(np.array([salt], np.uint64) for salt in salts))[0])
        == expected
    )


def test_draws_are_even():
    draws = hash64(np.arange(60_000), 1)
    assert 0 <= fraction(draws).min() < fraction(draws).max() < 1
    assert np.abs(np.bincount(below(draws, 6)) - 10_000).max() < 4.5 * 8333**0.5


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(0, 9), max_size=12), seed=st.integers(0, 2**32), data=st.data())
def test_each_group_has_its_smallest_draws_chosen(sizes, seed, data):
    counts = [data.draw(st.integers(0, n)) for n in sizes]
    draws = hash64(np.arange(sum(sizes)), seed)
    chosen = choose(draws, np.array(sizes, int), np.array(counts, int))
    first = 0
    for n, count in zip(sizes, counts, strict=True):
        group = draws[first : first + n] >> np.uint64(24)
        np.testing.assert_array_equal(
            np.sort(group[chosen[first : first + n]]), np.sort(group)[:count]
        )
        first += n


def test_a_shuffle_keeps_the_groups_and_equal_draws():
    group = np.array([0, 0, 0, 1, 1])
    draws = np.array([3, 1, 1, 2, 0], np.uint64) << np.uint64(40)
    assert shuffled(draws, group).tolist() == [1, 2, 0, 4, 3]

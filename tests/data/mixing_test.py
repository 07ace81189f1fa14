"""A global shuffle in every epoch, and sources in their proportions."""

import collections

from research.data.mixing import row_stream


def test_a_mixture_keeps_its_weights_and_every_source_its_epochs():
    rows = [row_stream([50, 30, 20], [5.0, 3.0, 2.0], seed=1)[i] for i in range(100)]
    assert sorted(rows) == [
        (source, row, 0) for source, n in enumerate([50, 30, 20]) for row in range(n)
    ]
    half = collections.Counter(source for source, _, _ in rows[:50])
    assert half == {0: 25, 1: 15, 2: 10}


def test_sources_and_seeds_are_shuffled_apart():
    """Grain counts the epoch into the seed, so close seeds would repeat one another's epochs."""
    stream = row_stream([40], [1.0], seed=1)
    other = row_stream([40], [1.0], seed=2)
    second_epoch = [stream[i] for i in range(40, 80)]
    assert [row for _, row, _ in second_epoch] != [other[i][1] for i in range(40)]
    assert sorted(second_epoch) == [(0, row, 1) for row in range(40)]


def test_one_row_is_enough():
    assert [row_stream([1], [1.0], seed=0)[i] for i in range(3)] == [
        (0, 0, epoch) for epoch in range(3)
    ]

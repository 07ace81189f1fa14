"""Index arithmetic of ragged groups equals plain loops over them, empty groups included."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from research.data.ragged import (
    exclusive_cumsum_in_groups,
    group_indices,
    group_starts,
    ragged_arange,
    range_indices,
)

GROUPS = st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=8)


def test_a_ragged_range_begins_anew_in_each_group():
    assert ragged_arange(np.array([2, 0, 3])).tolist() == [0, 1, 0, 1, 2]


@given(groups=GROUPS)
def test_indices_of_groups_are_those_of_a_loop(groups):
    sizes = np.array([len(group) for group in groups], int)
    owners = [g for g, group in enumerate(groups) for _ in group]
    assert group_indices(sizes).tolist() == owners
    assert group_starts(sizes).tolist() == [sum(map(len, groups[:g])) for g in range(len(groups))]


@given(ranges=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 5)), max_size=8))
def test_indices_of_ranges_are_those_of_a_loop(ranges):
    starts = np.array([start for start, _ in ranges], int)
    lengths = np.array([length for _, length in ranges], int)
    expected = [i for start, length in ranges for i in range(start, start + length)]
    assert range_indices(starts, lengths).tolist() == expected


@given(groups=GROUPS)
def test_exclusive_sums_of_groups_are_those_of_a_loop(groups):
    values = np.array([value for group in groups for value in group], int)
    sizes = np.array([len(group) for group in groups], int)
    expected = [sum(group[:i]) for group in groups for i in range(len(group))]
    assert exclusive_cumsum_in_groups(values, sizes).tolist() == expected

"""Index arithmetic over groups of different sizes that are stored one after the other.

Groups of sizes [3, 2] are five items: 0, 1 and 2 belong to group 0, and 3 and 4 to group 1.
"""

import numpy as np
from jaxtyping import Int, Shaped


def group_starts(sizes: Shaped[np.ndarray, "groups"]) -> Int[np.ndarray, "groups"]:
    """Returns the index of each group's first item: [3, 2] -> [0, 3]."""
    return np.cumsum(sizes) - sizes


def group_indices(sizes: Int[np.ndarray, "groups"]) -> Int[np.ndarray, "_"]:
    """Returns the group of each item: [3, 2] -> [0, 0, 0, 1, 1]."""
    return np.repeat(np.arange(len(sizes)), sizes)


def ragged_arange(sizes: Int[np.ndarray, "groups"]) -> Int[np.ndarray, "_"]:
    """Returns the index of each item in its group: [3, 2] -> [0, 1, 2, 0, 1]."""
    return np.arange(sizes.sum()) - np.repeat(group_starts(sizes), sizes)


def range_indices(
    starts: Int[np.ndarray, "groups"], lengths: Int[np.ndarray, "groups"]
) -> Int[np.ndarray, "_"]:
    """Returns all indices of some ranges: starts [7, 20], lengths [3, 2] -> [7, 8, 9, 20, 21]."""
    return np.repeat(starts, lengths) + ragged_arange(lengths)


def exclusive_cumsum_in_groups(
    values: Shaped[np.ndarray, "items"], sizes: Int[np.ndarray, "groups"]
) -> Int[np.ndarray, "items"]:
    """Returns the exclusive cumulative sum of values, restarted in every group.

    values [4, 1, 5, 2, 2], sizes [3, 2] -> [0, 4, 5, 0, 2]
    """
    sums = np.cumsum(values) - values

    # group_starts of an empty last group is len(values): append the total, so that this index
    # exists.
    with_total = np.append(sums, values.sum())
    first_sums = with_total[group_starts(sizes)]
    return sums - np.repeat(first_sums, sizes)

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


def starts_in_groups(
    lengths: Shaped[np.ndarray, "items"], sizes: Int[np.ndarray, "groups"]
) -> Int[np.ndarray, "items"]:
    """Returns where each item begins if those of a group follow each other, from 0 in every group.

    Args:
      lengths: of each item, as [4, 1, 5, 2, 2].
      sizes: items of each group, as [3, 2], which gives [0, 4, 5, 0, 2].
    """
    starts = group_starts(lengths)

    # An empty group may come last, so there is a start behind the last item, too.
    all_starts = np.append(starts, lengths.sum())
    first_starts = all_starts[group_starts(sizes)]
    return starts - np.repeat(first_starts, sizes)

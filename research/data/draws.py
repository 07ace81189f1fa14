"""Stateless random numbers: a draw is a hash of an index, the seed and a purpose, so every process
makes the same draws, in any order.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt

from research.data.ragged import group_indices, ragged_arange


def hash64(
    values: Integer[np.ndarray, "*shape"], *salts: int | UInt[np.ndarray, "*shape"]
) -> UInt[np.ndarray, "*shape"]:
    """Returns splitmix64 of each value, mixed with each salt: draws that no version of NumPy can
    change.

    Args:
      values: the indices or keys to hash; not negative.
      salts: the seed and the purpose, each one for all values or one per value; at least one.

    Source: Steele et al. 2014, doi:10.1145/2660193.2660195, figure 17.
    """
    # Unsigned arithmetic modulo 2⁶⁴ is meant to overflow.
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64)
        z += np.uint64(1)
        for salt in salts:
            if isinstance(salt, int):
                salt = np.uint64(salt % 2**64)
            z ^= salt

            # The steps of splitmix64 by their constants.
            z *= np.uint64(0x9E3779B97F4A7C15)
            z ^= z >> np.uint64(30)
            z *= np.uint64(0xBF58476D1CE4E5B9)
            z ^= z >> np.uint64(27)
            z *= np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
    return z


def fraction(draws: UInt[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Returns the draws as float64 in [0, 1)."""
    # The 53 highest bits: a float64 holds them exactly.
    high_bits = draws >> np.uint64(11)
    return high_bits * 2.0**-53


def below(
    draws: UInt[np.ndarray, "*shape"], bound: Integer[np.ndarray, "*shape"] | int
) -> Int[np.ndarray, "*shape"]:
    """Returns the draws as integers in [0, bound), for bounds far below 2⁵³."""
    scaled = fraction(draws) * bound
    return scaled.astype(np.int64)


def shuffled(
    draws: UInt[np.ndarray, "items"], group: Int[np.ndarray, "items"]
) -> Int[np.ndarray, "items"]:
    """Returns the indices that sort the items of each group by their draws, group after group;
    equal draws keep their order.

    Args:
      draws: of each item.
      group: of each item, in [0, 2²⁴).
    """
    # One sort key: the group in the 24 highest bits, the draw in the 40 others.
    group_bits = group.astype(np.uint64) << np.uint64(40)
    draw_bits = draws >> np.uint64(24)
    return np.argsort(group_bits | draw_bits, kind="stable")


def choose(
    draws: UInt[np.ndarray, "items"],
    sizes: Int[np.ndarray, "groups"],
    counts: Int[np.ndarray, "groups"],
) -> Bool[np.ndarray, "items"]:
    """Marks `counts[g]` of the `sizes[g]` items of each group, every choice as likely as every
    other.

    Args:
      draws: of each item, group by group.
      sizes: items of each group.
      counts: how many to mark; at most the size.
    """
    # The first items of each shuffled group are chosen:
    # sizes [3, 2], counts [1, 2], order [2, 0, 1, 4, 3] -> items 2, 4 and 3
    order = shuffled(draws, group_indices(sizes))
    is_first = ragged_arange(sizes) < np.repeat(counts, sizes)

    chosen = np.zeros(len(draws), bool)
    chosen[order[is_first]] = True
    return chosen

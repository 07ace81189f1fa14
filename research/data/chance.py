"""Randomness without a state: a draw is a hash of what it is for, so it does not matter who makes
it, or when.
"""

import numpy as np
from jaxtyping import Bool, Int, Integer, UInt


def hash64(
    values: Integer[np.ndarray, "*N"], *salts: int | UInt[np.ndarray, "*N"]
) -> UInt[np.ndarray, "*N"]:
    """Returns splitmix64 of each value, stirred with each salt: draws that no version of NumPy can
    change.

    Args:
      values: what is drawn for; not negative.
      salts: the seed and the purpose, one for all values or one each; at least one.

    Source: Steele et al. 2014, doi:10.1145/2660193.2660195, figure 17.
    """
    with np.errstate(over="ignore"):
        z = values.astype(np.uint64) + np.uint64(1)
        for salt in salts:
            z ^= np.uint64(salt % 2**64) if isinstance(salt, int) else salt
            z *= np.uint64(0x9E3779B97F4A7C15)
            z ^= z >> np.uint64(30)
            z *= np.uint64(0xBF58476D1CE4E5B9)
            z ^= z >> np.uint64(27)
            z *= np.uint64(0x94D049BB133111EB)
            z ^= z >> np.uint64(31)
    return z


def fraction(draws: UInt[np.ndarray, "*N"]) -> np.ndarray:
    """Returns the draws as float64 in [0, 1)."""
    return (draws >> np.uint64(11)) * 2.0**-53


def below(
    draws: UInt[np.ndarray, "*N"], bound: Integer[np.ndarray, "*N"] | int
) -> Int[np.ndarray, "*N"]:
    """Returns the draws as integers in [0, bound), for bounds far below 2⁵³."""
    return (fraction(draws) * bound).astype(np.int64)


def shuffled(draws: UInt[np.ndarray, "N"], group: Int[np.ndarray, "N"]) -> Int[np.ndarray, "N"]:
    """Returns an order that keeps the groups in theirs and sorts each by the draws; equal draws
    stay as they were.

    Args:
      draws: of each item.
      group: of each item, in [0, 2²⁴).
    """
    return np.argsort(
        (group.astype(np.uint64) << np.uint64(40)) | (draws >> np.uint64(24)), kind="stable"
    )


def choose(
    draws: UInt[np.ndarray, "N"], sizes: Int[np.ndarray, "G"], counts: Int[np.ndarray, "G"]
) -> Bool[np.ndarray, "N"]:
    """Marks `counts[g]` of the `sizes[g]` items of each group, every choice as likely as every
    other.

    Args:
      draws: of each item, group by group.
      sizes: items of each group.
      counts: how many to mark; at most the size.
    """
    chosen = np.zeros(len(draws), bool)
    order = shuffled(draws, np.repeat(np.arange(len(sizes)), sizes))
    chosen[order[ragged_arange(sizes) < np.repeat(counts, sizes)]] = True
    return chosen


def ragged_arange(sizes: Int[np.ndarray, "G"]) -> Int[np.ndarray, "_"]:
    """Returns 0 … sizes[0] - 1, 0 … sizes[1] - 1, and so on."""
    return np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)

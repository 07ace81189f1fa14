"""Random keys as a function of (seed, step): no step passes a key on to the next."""

import zlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Int, Key, UInt32

# Seeds are integers in [0, SEEDS).
SEEDS = 2**64


def keys_of(seeds: Sequence[int]) -> Key[Array, "B"]:
    """Returns the key of each seed in [0, 2⁶⁴). Below 2³² it is `jax.random.key(seed)`, which takes
    no larger seed.
    """
    return jax.random.wrap_key_data(key_words(seeds), impl="threefry2x32")


def key_words(seeds: Sequence[int]) -> UInt32[np.ndarray, "B 2"]:
    """Returns the keys of `keys_of` as words."""
    key_data = np.zeros((len(seeds), 2), np.uint32)
    # Threefry's key is the seed's upper 32 bits and its lower 32 bits:
    # seeds [5, 2³² + 7] -> [[0, 5], [1, 7]].
    for row, seed in enumerate(seeds):
        upper = seed >> 32
        lower = seed & 0xFFFFFFFF
        key_data[row] = (upper, lower)
    return key_data


def key_for(seed: int, purpose: str) -> jax.Array:
    """Returns the root key of one use of randomness (`"init"`, `"dropout"`, …) in a run."""
    root = jax.random.key(seed)
    # A checksum is the same in every process; Python's `hash` of a string is not.
    purpose_id = zlib.crc32(purpose.encode())
    return jax.random.fold_in(root, purpose_id)


def step_key(root: jax.Array, step: int | Int[Array, ""]) -> jax.Array:
    """Returns the key of one step."""
    return jax.random.fold_in(root, step)

"""Random keys as a function of (seed, step): no key is ever carried from one step to the next."""

import zlib
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Array, Int, Key

# A seed is a whole number below this.
SEEDS = 2**64


def keys_of(seeds: Sequence[int]) -> Key[Array, "B"]:
    """Returns the key of each seed in [0, 2⁶⁴). Below 2³² it is `jax.random.key(seed)`, which knows
    no larger seed.
    """
    # Threefry's key is the seed's upper 32 bits and its lower 32 bits: [B] -> [B, 2].
    halves = [(seed >> 32, seed & 0xFFFFFFFF) for seed in seeds]
    return jax.random.wrap_key_data(np.array(halves, np.uint32), impl="threefry2x32")


def key_for(seed: int, purpose: str) -> jax.Array:
    """Returns the root key of one use of randomness (`"init"`, `"dropout"`, …) in a run."""
    return jax.random.fold_in(jax.random.key(seed), zlib.crc32(purpose.encode()))


def step_key(root: jax.Array, step: int | Int[Array, ""]) -> jax.Array:
    """Returns the key of one step."""
    return jax.random.fold_in(root, step)

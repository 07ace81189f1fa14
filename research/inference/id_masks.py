"""Masks over ids as bits: id i is bit i % 32 of word i // 32. An eighth of the bytes that bools
would send to the device.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, UInt32

# Ids whose bits are in one word.
WORD = 32


def num_words(num_ids: int) -> int:
    """Returns the words of a mask."""
    return -(-num_ids // WORD)


def unpack_bits(words: UInt32[Array, "B words"], count: int) -> Bool[Array, "B V"]:
    """Returns the first `count` bits of each row."""
    shifts = jnp.arange(WORD, dtype=jnp.uint32)[None, None, :]
    bits = (words[:, :, None] >> shifts) & jnp.uint32(1)
    # [B, words, 32] -> [B, words · 32]
    return bits.reshape(len(words), -1)[:, :count].astype(bool)


def pack_bits(bits: Bool[Array, "B V"]) -> UInt32[Array, "B words"]:
    """Returns rows of bits as words; those that fill up the last word are 0."""
    rows, count = bits.shape
    padded = jnp.pad(bits, ((0, 0), (0, -count % WORD)))
    shifts = jnp.arange(WORD, dtype=jnp.uint32)[None, None, :]
    by_word = padded.reshape(rows, -1, WORD).astype(jnp.uint32) << shifts
    return jnp.sum(by_word, axis=-1, dtype=jnp.uint32)


def pack_words(allowed: Bool[np.ndarray, "ids"]) -> UInt32[np.ndarray, "words"]:
    """Returns bits as words, as `pack_bits` does."""
    padded = np.pad(allowed, (0, -len(allowed) % WORD))
    # Bit 0 of byte 0 is id 0.
    return np.packbits(padded, bitorder="little").view("<u4").astype(np.uint32)


def mask_of(ids: Sequence[int], num_words: int) -> UInt32[np.ndarray, "words"]:
    """Returns the mask that allows these ids."""
    allowed = np.zeros(num_words * WORD, bool)
    allowed[list(ids)] = True
    return pack_words(allowed)

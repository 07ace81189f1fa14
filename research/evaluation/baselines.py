"""What held-out text costs without a neural network: gzip, and a byte n-gram model.

Both count bits of whole documents, so that they compare with a model's bits per byte on the same
text.
"""

import gzip
import math
from collections.abc import Iterable

import numpy as np
from jaxtyping import Float, Int, UInt64

# A key holds an n-gram of bytes in 64 bits, its last byte lowest.
MAX_ORDER = 8
_BYTE_BITS = np.uint64(8)


def gzip_bits(texts: Iterable[bytes]) -> float:
    """Returns the bits of all texts, each compressed alone by gzip at its best level."""
    size = 0
    for text in texts:
        # No time of day in the header: the same bytes at every call.
        compressed = gzip.compress(text, compresslevel=9, mtime=0)
        size += len(compressed)
    return 8.0 * size


class ByteNgram:
    """Interpolated Kneser-Ney over bytes.

    p(w | h) = max(c(h w) − D, 0) / c(h) + D · N(h) / c(h) · p(w | h'), with h' the context h
    without its first byte, N(h) the number of different bytes after h, and D = n₁ / (n₁ + 2 n₂)
    from the numbers of n-grams that were counted once and twice. Below the highest order c(h w) is
    the number of different bytes that come before h w. The lowest order falls back to 1 / 256.

    Source: Chen & Goodman 1999, "An empirical study of smoothing techniques for language
    modeling", sections 2.7 and 3.

    Args:
      texts: the documents to count; contexts do not reach over their beginnings.
      order: n, bytes of an n-gram, from 1 to 8.
    """

    def __init__(self, texts: Iterable[bytes], order: int = 5):
        assert 1 <= order <= MAX_ORDER
        self.order = order
        self._levels: dict[int, _Level] = {}  # by length

        keys = _keys(texts, order)
        for length in range(order, 0, -1):
            # At the highest order every place in the text counts. Below it each different n-gram
            # counts once for the (n − 1)-gram that it ends with: "xab", "yab" -> "ab" twice.
            keys = _suffixes(keys, length)
            keys, counts = np.unique(keys, return_counts=True)
            self._levels[length] = _Level(keys, counts)

    def bits(self, texts: Iterable[bytes]) -> float:
        """Returns −Σ log₂ p of all bytes of the texts."""
        keys = _keys(texts, self.order)
        probability = np.full(len(keys), 1 / 256)
        for length in range(1, self.order + 1):
            ngrams = _suffixes(keys, length)
            level = self._levels[length]
            probability = level.interpolate(ngrams, probability)

        log_p = np.log2(probability)
        return float(-log_p.sum())


class _Level:
    """The n-grams of one length.

    Args:
      keys: the different n-grams, sorted.
      counts: of each.
    """

    def __init__(self, keys: UInt64[np.ndarray, "ngrams"], counts: Int[np.ndarray, "ngrams"]):
        once = np.count_nonzero(counts == 1)
        twice = np.count_nonzero(counts == 2)
        self._discount = once / max(once + 2 * twice, 1)
        self._keys = keys
        self._counts = counts

        # Keys are sorted, so those of one context lie side by side:
        # contexts [a, a, b] -> starts [0, 2], followers [2, 1].
        contexts = keys >> _BYTE_BITS
        self._contexts, starts = np.unique(contexts, return_index=True)
        self._totals = np.add.reduceat(counts, starts)
        self._followers = np.diff(starts, append=len(keys))

    def interpolate(
        self, keys: UInt64[np.ndarray, "bytes"], shorter: Float[np.ndarray, "bytes"]
    ) -> Float[np.ndarray, "bytes"]:
        """Returns p of each n-gram's last byte from that after the context one byte shorter."""
        counts = _look_up(self._keys, self._counts, keys)
        contexts = keys >> _BYTE_BITS
        totals = _look_up(self._contexts, self._totals, contexts)
        followers = _look_up(self._contexts, self._followers, contexts)

        discounted = np.maximum(counts - self._discount, 0)
        left_over = self._discount * followers * shorter

        # A context that was never counted leaves the shorter one's p.
        known = totals > 0
        divisor = np.maximum(totals, 1)
        interpolated = (discounted + left_over) / divisor
        return np.where(known, interpolated, shorter)


def _keys(texts: Iterable[bytes], order: int) -> UInt64[np.ndarray, "bytes"]:
    """Returns the n-gram that ends with each byte; before a document there are zeros."""
    keys = [np.zeros(0, np.uint64)]
    for text in texts:
        padded = np.frombuffer(bytes(order - 1) + text, np.uint8)
        padded = padded.astype(np.uint64)

        # One byte of all n-grams after the other: order 3, "abc" -> "\0\0a", "\0ab", "abc".
        key = np.zeros(len(text), np.uint64)
        for offset in range(order):
            key <<= _BYTE_BITS
            key |= padded[offset : offset + len(text)]
        keys.append(key)
    return np.concatenate(keys)


def _suffixes(keys: UInt64[np.ndarray, "bytes"], length: int) -> UInt64[np.ndarray, "bytes"]:
    """Returns the last `length` bytes of each key."""
    # Length 2 -> mask 0xFFFF
    bits = 8 * length
    mask = (1 << bits) - 1
    return keys & np.uint64(mask)


def _look_up(
    keys: UInt64[np.ndarray, "entries"],
    values: Int[np.ndarray, "entries"],
    wanted: UInt64[np.ndarray, "bytes"],
) -> Int[np.ndarray, "bytes"]:
    """Returns the value of each wanted key in a sorted table, 0 where it is not there."""
    # Keys [2, 5], wanted [5, 7] -> index [1, 2] -> [1, 1], as 7 is above all keys; found [1, 0]
    index = np.searchsorted(keys, wanted)
    last = len(keys) - 1
    index = np.minimum(index, last)
    found = keys[index] == wanted
    return np.where(found, values[index], 0)


def bits_per_byte(bits: float, texts: Iterable[bytes]) -> float:
    """Returns the bits for each byte of the texts; NaN for none."""
    size = sum(len(text) for text in texts)
    if not size:
        return math.nan
    return bits / size

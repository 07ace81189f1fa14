"""Baselines: an n-gram model is a distribution, has the values of the equation, and learns."""

import gzip
import math
from collections import Counter

import numpy as np
import pytest

from research.evaluation.baselines import ByteNgram, bits_per_byte, gzip_bits

TEXTS = [b"abracadabra", b"abba", b"\x00\xff\x00"]


def plain_probability(texts: list[bytes], order: int, context: bytes, byte: int) -> float:
    """The equation, one n-gram at a time, with dictionaries."""
    padded = [bytes(order - 1) + text for text in texts]
    grams = Counter(
        text[end - order : end] for text in padded for end in range(order, len(text) + 1)
    )
    levels = {order: grams}
    for length in range(order - 1, 0, -1):
        levels[length] = Counter(gram[1:] for gram in levels[length + 1])

    probability = 1 / 256
    for length in range(1, order + 1):
        counts = levels[length]
        n1, n2 = (sum(count == k for count in counts.values()) for k in (1, 2))
        discount = n1 / max(n1 + 2 * n2, 1)
        history = context[len(context) - length + 1 :]
        following = [count for gram, count in counts.items() if gram[:-1] == history]
        if following:
            total = sum(following)
            kept = max(counts[history + bytes([byte])] - discount, 0)
            probability = (kept + discount * len(following) * probability) / total
    return probability


@pytest.mark.parametrize("order", [1, 2, 5])
def test_bits_are_those_of_the_equation(order: int):
    text = b"abrac\x00dabz"
    padded = bytes(order - 1) + text
    wanted = -sum(
        math.log2(plain_probability(TEXTS, order, padded[end - order + 1 : end], padded[end]))
        for end in range(order - 1, len(padded))
    )
    assert ByteNgram(TEXTS, order).bits([text]) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("context", [b"abra", b"zzzz", b"\x00\x00\x00a"])
def test_probabilities_after_a_context_sum_to_one(context: bytes):
    model = ByteNgram(TEXTS, 5)
    before = model.bits([context])
    each = [2 ** -(model.bits([context + bytes([byte])]) - before) for byte in range(256)]
    assert sum(each) == pytest.approx(1, rel=1e-9)


def test_longer_contexts_learn_more_and_noise_costs_eight_bits():
    rng = np.random.default_rng(0)
    words = [b"alpha ", b"beta ", b"gamma ", b"delta "]
    train, heldout = (b"".join(words[i] for i in rng.integers(4, size=5000)) for _ in range(2))
    costs = [bits_per_byte(ByteNgram([train], n).bits([heldout]), [heldout]) for n in (1, 3, 5)]
    entropy = 2 * 5000 / len(heldout)  # a word costs 2 bits
    assert costs[0] > costs[1] > costs[2] > entropy
    assert costs[2] == pytest.approx(entropy, rel=0.01)

    noise = [rng.bytes(20_000) for _ in range(2)]  # the control
    assert bits_per_byte(ByteNgram([noise[0]], 5).bits([noise[1]]), [noise[1]]) > 7.9


def test_gzip_counts_whole_files():
    text = b"spam and eggs " * 100
    assert gzip_bits([text, text]) == 2 * 8 * len(gzip.compress(text, 9, mtime=0))
    assert math.isnan(bits_per_byte(0.0, []))

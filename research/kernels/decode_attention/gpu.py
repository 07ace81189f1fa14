"""Decode attention for GPU: not there yet."""

from jaxtyping import Array, Float

from research.kernels.attention import ScoreTerms
from research.kernels.decode_attention.pages import KVPages


def refusal(q: Float[Array, "B R N H"], pages: KVPages, window: int | None, terms: ScoreTerms) -> str:
    """Takes nothing yet."""
    return "every call: it is not there yet"

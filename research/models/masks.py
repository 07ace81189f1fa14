"""The attention masks of a transformer, by its structure."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from research.kernels.attention import AttentionMask
from research.models.config import ModelConfig


def sequence_mask(
    config: ModelConfig,
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None,
    prefix: Int[Array, "B T"] | None,
    cached: bool,
) -> AttentionMask:
    """Returns the mask of self-attention, without a layer's window.

    Args:
      config: the model, whose structure decides.
      positions, segments, prefix: as of `Batch`.
      cached: whether keys are in a cache; then a row is one sequence.
    """
    causal = config.structure != "encoder"
    mask = AttentionMask(causal=causal, q_segments=segments, kv_segments=segments)
    if prefix is None or config.structure != "prefix":
        return mask
    if cached:
        return dataclasses.replace(mask, prefix=prefix.sum(axis=1))

    # A causal mask in which all tokens of a prefix have the index of their sequence's first token,
    # so that none of them comes after another. Two sequences with prefixes of 2 tokens:
    # positions [0, 1, 2, 0, 1, 2] -> mask positions [0, 0, 2, 3, 3, 5]
    index = jnp.arange(positions.shape[1], dtype=positions.dtype)
    index = jnp.broadcast_to(index, positions.shape)
    mask_positions = jnp.where(prefix != 0, index - positions, index)
    return dataclasses.replace(mask, q_positions=mask_positions, kv_positions=mask_positions)


def memory_mask(
    positions: Int[Array, "B T"],
    segments: Int[Array, "B T"] | None,
    encoder_segments: Int[Array, "B M"] | None,
) -> AttentionMask:
    """Returns the mask of cross-attention: the encoder's tokens of the same segment, or without
    segments all real ones.
    """
    if encoder_segments is None:
        return AttentionMask()
    if segments is None:
        real = (encoder_segments != 0).astype(positions.dtype)
        return AttentionMask(q_segments=jnp.ones_like(positions), kv_segments=real)
    return AttentionMask(q_segments=segments, kv_segments=encoder_segments)

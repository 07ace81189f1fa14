"""Weighted sums over tokens: cross-entropy and z-loss."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def weighted_sum(
    values: Float[Array, "*batch"], weights: Float[Array, "*batch"]
) -> Float[Array, ""]:
    """Returns Σ w v in float32. A value of weight 0 adds nothing, even if it is infinite."""
    weighted = values.astype(jnp.float32) * weights
    # 0 · inf is NaN.
    return jnp.sum(jnp.where(weights == 0, 0.0, weighted))


def z_loss(log_z: Float[Array, "*batch"], coefficient: float) -> Float[Array, "*batch"]:
    """Returns coefficient · log_z², which keeps the softmax normalizer near 1.

    Source: Chowdhery et al. 2022 (PaLM), arXiv:2204.02311, section 5.
    """
    return coefficient * jnp.square(log_z)

"""Where a token stands: sinusoidal waves, rotary turns, ALiBi slopes."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.models.config import PositionConfig, RopeScalingConfig


def sinusoidal(positions: Int[Array, "B T"], width: int) -> Float[Array, "B T D"]:
    """Returns sines in even columns and cosines in odd ones, PE(p, 2i) = sin(p / 10000^(2i/D)).

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    frequencies = 10_000.0 ** (-np.arange(0, width, 2) / width)
    angles = positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return waves.reshape(*positions.shape, -1)[..., :width]


def rotary_frequencies(config: PositionConfig, head_dim: int) -> Float[np.ndarray, " half"]:
    """Returns the angle per position of each pair of head columns, θ^(−2i/H), stretched where the config says so."""
    frequencies = config.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.scaling is not None:
        frequencies = _stretch(frequencies, config.scaling)
    return frequencies.astype(np.float32)


def _stretch(frequencies: Float[np.ndarray, " half"], scaling: RopeScalingConfig) -> Float[np.ndarray, " half"]:
    """Divides slow waves by the factor, keeps fast ones, and blends between (LLaMA 3.1 release, `apply_scaling`)."""
    turns = scaling.original_length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def rotate(
    config: PositionConfig, x: Float[Array, "B T heads H"], positions: Int[Array, "B T"]
) -> Float[Array, "B T heads H"]:
    """Turns column pairs (i, i + H/2) of each head by position · frequency i; other kinds of position leave x alone.

    Source: Su et al. 2021, arXiv:2104.09864, equation 34; columns are paired by halves, as in Hugging Face weights,
    where the paper pairs neighbours.
    """
    if config.kind != "rotary":
        return x
    angles = positions[..., None].astype(jnp.float32) * rotary_frequencies(config, x.shape[-1])
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " N"]:
    """Returns the slope of each head, 2^(−8i/N); between powers of two, every other slope of the next one fills up.

    Source: Press et al. 2021, arXiv:2108.12409, section 3.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    more = 2.0 ** (-4.0 / power * np.arange(1, 2 * (num_heads - power), 2))
    return np.concatenate([slopes, more]).astype(np.float32)

"""RoPE scaling: rotary frequencies, changed for contexts longer than the model was trained on."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.models.position_config import PositionConfig, RopeScalingConfig


def rotary_frequencies(config: PositionConfig, width: int) -> Float[np.ndarray, " half"]:
    """Returns the angle per position of each pair of `width` columns, θ^(−2i/width), scaled as the
    config says.

    Rules that depend on the length of a document give the frequencies for documents of up to the
    original length; `frequencies_by_length` has those of longer ones.
    """
    frequencies = config.theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if config.scaling is not None:
        scale = _ROPE_SCALING[config.scaling.kind]
        frequencies = scale(frequencies, config.scaling, config.theta)
    return frequencies.astype(np.float32)


def frequencies_by_length(
    config: PositionConfig, width: int, lengths: Int[Array, "B T"]
) -> Float[Array, "B T half"]:
    """Returns the frequencies in documents of these lengths, by rules that depend on them: those of
    `rotary_frequencies` up to the original length, others beyond.

    Source: `longrope`: Ding et al. 2024, arXiv:2402.13753; `dynamic`: Peng et al. 2023,
    arXiv:2309.00071, equation 11, and its dynamic use in section 3.3: theta grows with the length.
    """
    scaling = config.scaling
    original = rotary_frequencies(config, width)[None, None]
    is_longer = lengths[..., None] > scaling.original_length
    exponents = (np.arange(0, width, 2) / width)[None, None]
    if scaling.kind == "longrope":
        scaled = config.theta**-exponents / np.array(scaling.long_factors)
        return jnp.where(is_longer, jnp.asarray(scaled, jnp.float32), original)

    # Other documents keep theta, which also keeps the base of the power above 0.
    ratio = lengths[..., None].astype(jnp.float32) / scaling.original_length
    growth = jnp.where(is_longer, scaling.factor * ratio - (scaling.factor - 1), 1.0)
    theta = config.theta * growth ** (width / (width - 2))
    scaled = jnp.exp(-jnp.log(theta) * exponents.astype(np.float32))
    return jnp.where(is_longer, scaled, original)


def _linear(frequencies: np.ndarray, scaling: RopeScalingConfig, theta: float) -> np.ndarray:
    return frequencies / scaling.factor


def _llama3(frequencies: np.ndarray, scaling: RopeScalingConfig, theta: float) -> np.ndarray:
    """Divides low frequencies by the factor, keeps high ones, and interpolates between (LLaMA 3.1
    release, `apply_scaling`).
    """
    # Rotations of each column pair within the original length.
    rotations = scaling.original_length * frequencies / (2 * math.pi)
    low = scaling.low_frequency_factor
    high = scaling.high_frequency_factor
    kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(frequencies: np.ndarray, scaling: RopeScalingConfig, theta: float) -> np.ndarray:
    """Interpolates as `_llama3` does, by a ramp over columns: Peng et al. 2023, arXiv:2309.00071,
    equations 17 to 20.
    """
    half = len(frequencies)
    width = 2 * half
    # The column pair, as a real number, that rotates so often within the original length.
    rotations = np.array([scaling.beta_fast, scaling.beta_slow])
    wavelengths = scaling.original_length / (rotations * 2 * math.pi)
    low, high = width * np.log(wavelengths) / (2 * math.log(theta))
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, width - 1)

    # A ramp of no width becomes a step, as in the authors' code.
    ramp = high - low if high > low else 1e-3
    scaled = np.clip((np.arange(half) - low) / ramp, 0.0, 1.0)
    return scaled * frequencies / scaling.factor + (1 - scaled) * frequencies


def _dynamic(frequencies: np.ndarray, scaling: RopeScalingConfig, theta: float) -> np.ndarray:
    return frequencies


def _longrope(frequencies: np.ndarray, scaling: RopeScalingConfig, theta: float) -> np.ndarray:
    return frequencies / np.array(scaling.short_factors)


_ROPE_SCALING = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "dynamic": _dynamic,
    "longrope": _longrope,
}

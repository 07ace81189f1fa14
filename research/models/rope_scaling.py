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
    # width 4 -> exponents [0, -1/2]
    exponents = -np.arange(0, width, 2, dtype=np.float64) / width
    frequencies = config.theta**exponents
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
    # [width/2] -> [1, 1, width/2]
    original = rotary_frequencies(config, width)[None, None]
    exponents = np.arange(0, width, 2) / width
    exponents = exponents[None, None]

    # [B, T] -> [B, T, 1]
    lengths = lengths[..., None]
    is_longer = lengths > scaling.original_length
    if scaling.kind == "longrope":
        unscaled = config.theta**-exponents
        scaled = unscaled / np.array(scaling.long_factors)
        scaled = jnp.asarray(scaled, jnp.float32)
        return jnp.where(is_longer, scaled, original)

    # Twice the original length with factor 4 -> theta grows by (4 · 2 - 3)^(width / (width - 2)).
    ratio = lengths.astype(jnp.float32) / scaling.original_length
    growth = scaling.factor * ratio - (scaling.factor - 1)
    # Other documents keep theta, which also keeps the base of the power above 0.
    growth = jnp.where(is_longer, growth, 1.0)
    power = width / (width - 2)
    theta = config.theta * growth**power
    log_frequencies = -jnp.log(theta) * exponents.astype(np.float32)
    scaled = jnp.exp(log_frequencies)
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
    # Rotations [low, halfway, high] -> kept [0, 1/2, 1].
    ramp = (rotations - low) / (high - low)
    kept = np.clip(ramp, 0.0, 1.0)
    divided_part = (1 - kept) * frequencies / scaling.factor
    kept_part = kept * frequencies
    return divided_part + kept_part


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

    # low 7.3, high 15.2 -> the ramp is from column pair 7 to 16.
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, width - 1)

    # A ramp of no width becomes a step, as in the authors' code.
    ramp = high - low if high > low else 1e-3
    pairs = np.arange(half)
    scaled = np.clip((pairs - low) / ramp, 0.0, 1.0)
    divided_part = scaled * frequencies / scaling.factor
    kept_part = (1 - scaled) * frequencies
    return divided_part + kept_part


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

"""Where a token stands: sinusoidal waves, rotary turns and their scaling rules, ALiBi slopes,
buckets of distances.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.models.position_config import PositionConfig, RopeScalingConfig


def sinusoidal(
    positions: Int[Array, "..."], width: int, halves: bool = False
) -> Float[Array, "... D"]:
    """Returns sines in even columns and cosines in odd ones, PE(p, 2i) = sin(p / 10000^(2i/D)).

    Args:
      positions: p.
      width: D.
      halves: whether all sines come first, then all cosines, in the same order.

    Source: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    frequencies = 10_000.0 ** (-np.arange(0, width, 2) / width)
    frequencies = jax.lax.broadcast_to_rank(frequencies.astype(np.float32), positions.ndim + 1)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    waves = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-2 if halves else -1)
    return waves.reshape(*positions.shape, -1)[..., :width]


def document_lengths(positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the length of each token's own document, which ends where positions stop counting
    up.
    """
    index = jnp.arange(positions.shape[1], dtype=positions.dtype)[None]
    ends = jnp.concatenate(
        [positions[:, 1:] != positions[:, :-1] + 1, jnp.ones_like(positions[:, :1], bool)], axis=1
    )
    own_end = jax.lax.cummin(jnp.where(ends, index, positions.shape[1]), axis=1, reverse=True)
    return positions + own_end - index + 1


def rotary_frequencies(config: PositionConfig, width: int) -> Float[np.ndarray, " half"]:
    """Returns the angle per position of each pair of `width` columns, θ^(−2i/width), stretched as
    the config says.

    Rules that go by the length of a document give what they give documents of up to the original
    length.
    """
    frequencies = config.theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    if config.scaling is not None:
        frequencies = _ROPE_SCALING[config.scaling.kind](frequencies, config.scaling, config.theta)
    return frequencies.astype(np.float32)


def _linear(frequencies: np.ndarray, scaling: RopeScalingConfig, theta: float) -> np.ndarray:
    return frequencies / scaling.factor


def _llama3(frequencies: np.ndarray, scaling: RopeScalingConfig, theta: float) -> np.ndarray:
    """Divides slow waves by the factor, keeps fast ones, and blends between (LLaMA 3.1 release,
    `apply_scaling`).
    """
    turns = scaling.original_length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _yarn(frequencies: np.ndarray, scaling: RopeScalingConfig, theta: float) -> np.ndarray:
    """Blends as `_llama3` does, by a ramp over columns: Peng et al. 2023, arXiv:2309.00071,
    equations 17 to 20.
    """
    width = 2 * len(frequencies)
    turns = np.array([scaling.beta_fast, scaling.beta_slow])
    # The column, as a real number, of the wave that turns so often within the original length.
    low, high = (
        width * np.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
    )
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    # A ramp of no width becomes a step, as in the authors' code.
    stretched = np.clip(
        (np.arange(width // 2) - low) / (high - low if high > low else 1e-3), 0.0, 1.0
    )
    return stretched * frequencies / scaling.factor + (1 - stretched) * frequencies


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


def _angles(
    config: PositionConfig,
    width: int,
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B T"] | None,
) -> Float[Array, "B T half"]:
    """Returns the angle of each pair of columns, by the frequencies for documents of these
    lengths.
    """
    at, scaling = positions[..., None].astype(jnp.float32), config.scaling
    frequencies = rotary_frequencies(config, width)[None, None]
    if scaling is None or not scaling.by_length:
        return at * frequencies
    assert lengths is not None, f"{scaling.kind} needs lengths"
    longer = lengths[..., None] > scaling.original_length
    exponents = (np.arange(0, width, 2) / width)[None, None]
    if scaling.kind == "longrope":
        stretched = jnp.asarray(
            config.theta**-exponents / np.array(scaling.long_factors), jnp.float32
        )
    else:
        # Theta grows with the length: arXiv:2309.00071, equation 11, and its dynamic use in section
        # 3.3.
        ratio = lengths[..., None].astype(jnp.float32) / scaling.original_length
        growth = jnp.where(longer, scaling.factor * ratio - (scaling.factor - 1), 1.0) ** (
            width / (width - 2)
        )
        stretched = jnp.exp(-jnp.log(config.theta * growth) * exponents.astype(np.float32))
    return at * jnp.where(longer, stretched, frequencies)


def rotate(
    config: PositionConfig,
    x: Float[Array, "B T heads H"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T heads H"]:
    """Turns column pairs (i, i + R/2) of each head by position · frequency i; other kinds of
    position leave x alone.

    R is `rotary_dim`, all of the head where it is None; columns from R on stay as they are.

    Args:
      config: the positions.
      x: queries or keys.
      positions: of each token in its document.
      lengths: of each token's document, for the rules that go by it
          (`RopeScalingConfig.by_length`).

    Source: Su et al. 2021, arXiv:2104.09864, equation 34; columns are paired by halves, as in
    Hugging Face weights, where the paper pairs neighbours.
    """
    if config.kind != "rotary":
        return x
    width = x.shape[-1] if config.rotary_dim is None else config.rotary_dim
    angles = _angles(config, width, positions, lengths)
    cos, sin = jnp.cos(angles)[:, :, None, :], jnp.sin(angles)[:, :, None, :]
    if config.scaling is not None and config.scaling.amplitude != 1:
        cos, sin = cos * config.scaling.amplitude, sin * config.scaling.amplitude
    first, second = jnp.split(x[..., :width].astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
    return turned if width == x.shape[-1] else jnp.concatenate([turned, x[..., width:]], axis=-1)


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " N"]:
    """Returns the slope of each head, 2^(−8i/N); between powers of two, every other slope of the
    next one fills up.

    Source: Press et al. 2021, arXiv:2108.12409, section 3.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = 2.0 ** (-8.0 / power * np.arange(1, power + 1))
    more = 2.0 ** (-4.0 / power * np.arange(1, 2 * (num_heads - power), 2))
    return np.concatenate([slopes, more]).astype(np.float32)


def rounded_alibi(
    places: Int[Array, "B S"], num_heads: int, head_dim: int
) -> Float[Array, "B N 1 S"]:
    """Returns slope · place / √H of each key, slopes, places and products rounded to bfloat16.

    A causal softmax does not see what all keys of a query have in common, so without the rounding
    this is ALiBi.

    Source: the code released with Falcon-RW, which was trained so (Penedo et al. 2023,
        arXiv:2306.01116).
    """

    def rounded(x: Float[Array, "..."]) -> Float[Array, "..."]:
        # Not a cast: XLA may leave out casts that only lose precision.
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    slopes = rounded(jnp.asarray(alibi_slopes(num_heads)))
    products = rounded(slopes[None, :, None] * rounded(places.astype(jnp.float32))[:, None])
    return products[:, :, None] / math.sqrt(head_dim)


def distance_buckets(
    config: PositionConfig, distances: Int[Array, "..."], bidirectional: bool
) -> Int[Array, "..."]:
    """Returns the bucket of each distance p_s − p_t: one a distance while they are small, then
    growing with its log.

    Args:
      config: how many buckets, and from which distance on all share the last.
      distances: key position less query position.
      bidirectional: whether keys on both sides are seen, which have half of the buckets each; else
        the keys that come later share the bucket of distance 0.

    Source: Raffel et al. 2020, arXiv:1910.10683, section 2.1, with the arithmetic of the released
        code.
    """
    count = config.num_buckets // 2 if bidirectional else config.num_buckets
    exact = count // 2
    steps = np.arange(1, config.max_distance + 1, dtype=np.float32)
    grown = exact + (
        np.log(steps / exact) / math.log(config.max_distance / exact) * (count - exact)
    ).astype(np.int32)
    table = np.where(steps < exact, steps.astype(np.int32), np.minimum(grown, count - 1))
    table = np.concatenate([[0], table]).astype(np.int32)
    back = jnp.maximum(-distances, 0)
    if not bidirectional:
        return jnp.asarray(table)[jnp.minimum(back, config.max_distance)]
    buckets = jnp.asarray(table)[jnp.minimum(jnp.abs(distances), config.max_distance)]
    return jnp.where(distances > 0, buckets + count, buckets)

"""Positions: sinusoids, rotary embeddings (RoPE), ALiBi slopes, buckets of distances."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.models.position_config import PositionConfig
from research.models.rope_scaling import frequencies_by_length, rotary_frequencies


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
    exponents = -np.arange(0, width, 2) / width
    frequencies = (10_000.0**exponents).astype(np.float32)
    # [..., 1] * [..., width/2] -> [..., width/2]
    frequencies = jax.lax.broadcast_to_rank(frequencies, positions.ndim + 1)
    angles = positions[..., None].astype(jnp.float32) * frequencies

    # Stacked on the last axis sines and cosines alternate: [s0, c0, s1, c1]; on the axis before it
    # they are halves: [s0, s1, c0, c1]. Of an odd width the last cosine is cut off.
    axis = -2 if halves else -1
    sines = jnp.sin(angles)
    cosines = jnp.cos(angles)
    waves = jnp.stack([sines, cosines], axis=axis)
    columns = waves.reshape(*positions.shape, -1)
    return columns[..., :width]


def document_lengths(positions: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Returns the length of each token's own document, which ends where positions stop counting
    up.
    """
    row_length = positions.shape[1]
    index = jnp.arange(row_length, dtype=positions.dtype)[None]

    # positions [0, 1, 2, 0, 1] -> is_end [F, F, T, F, T]
    following = positions[:, 1:]
    expected = positions[:, :-1] + 1
    breaks = following != expected
    last = jnp.ones_like(positions[:, :1], bool)
    is_end = jnp.concatenate([breaks, last], axis=1)

    # The next end at or after each token: [2, 2, 2, 4, 4] -> lengths [3, 3, 3, 2, 2]
    end = jnp.where(is_end, index, row_length)
    own_end = jax.lax.cummin(end, axis=1, reverse=True)
    return positions + own_end - index + 1


def rotate(
    config: PositionConfig,
    x: Float[Array, "B T heads H"],
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T heads H"]:
    """Applies RoPE: rotates column pairs (i, i + width/2) of each head by position · frequency i;
    other kinds of position leave x alone.

    The width is `rotary_dim`, all of the head where it is None; columns after it stay as they are.

    Args:
      config: the positions.
      x: queries or keys.
      positions: of each token in its document.
      lengths: of each token's document, for RoPE scaling rules that depend on it
          (`RopeScalingConfig.by_length`).

    Source: Su et al. 2021, arXiv:2104.09864, equation 34; columns are paired by halves, as in
    Hugging Face weights, where the paper pairs neighbours.
    """
    if config.kind != "rotary":
        return x
    head_dim = x.shape[-1]
    width = head_dim if config.rotary_dim is None else config.rotary_dim
    angles = _angles(config, width, positions, lengths)

    # [B, T, width/2] -> [B, T, 1, width/2]: all heads are rotated alike.
    cos = jnp.cos(angles)[:, :, None, :]
    sin = jnp.sin(angles)[:, :, None, :]
    scaling = config.scaling
    if scaling is not None and scaling.amplitude != 1:
        cos = cos * scaling.amplitude
        sin = sin * scaling.amplitude

    # Column i is paired with column i + width/2: [.., width] -> [.., width/2], [.., width/2].
    rotary = x[..., :width].astype(jnp.float32)
    first, second = jnp.split(rotary, 2, axis=-1)
    rotated_first = first * cos - second * sin
    rotated_second = second * cos + first * sin
    rotated = jnp.concatenate([rotated_first, rotated_second], axis=-1)
    rotated = rotated.astype(x.dtype)
    if width == head_dim:
        return rotated
    not_rotary = x[..., width:]
    return jnp.concatenate([rotated, not_rotary], axis=-1)


def _angles(
    config: PositionConfig,
    width: int,
    positions: Int[Array, "B T"],
    lengths: Int[Array, "B T"] | None,
) -> Float[Array, "B T half"]:
    """Returns the angle of each pair of columns, by the frequencies for documents of these
    lengths.
    """
    # [B, T, 1] * [1, 1, width/2] -> [B, T, width/2]
    positions = positions[..., None].astype(jnp.float32)
    scaling = config.scaling
    if scaling is None or not scaling.by_length:
        frequencies = rotary_frequencies(config, width)[None, None]
        return positions * frequencies

    assert lengths is not None, f"{scaling.kind} needs lengths"
    frequencies = frequencies_by_length(config, width, lengths)
    return positions * frequencies


def alibi_slopes(num_heads: int) -> Float[np.ndarray, " N"]:
    """Returns the slope of each head, 2^(−8i/N); between powers of two, every other slope of the
    next one fills up.

    Source: Press et al. 2021, arXiv:2108.12409, section 3.
    """
    # 12 heads: the 8 slopes of 8 heads, and every other one of the first 8 slopes of 16 heads.
    power = 2 ** math.floor(math.log2(num_heads))
    num_missing = num_heads - power
    exponents = -8.0 / power * np.arange(1, power + 1)
    missing_exponents = -4.0 / power * np.arange(1, 2 * num_missing, 2)
    exponents = np.concatenate([exponents, missing_exponents])
    slopes = 2.0**exponents
    return slopes.astype(np.float32)


def rounded_alibi(
    key_positions: Int[Array, "B S"], num_heads: int, head_dim: int
) -> Float[Array, "B N 1 S"]:
    """Returns slope · position / √H of each key; slopes, positions and products are rounded to
    bfloat16.

    Softmax is the same whatever is added to all scores of a query, so without the rounding this is
    ALiBi.

    Source: the code released with Falcon-RW, which was trained so (Penedo et al. 2023,
        arXiv:2306.01116).
    """

    def rounded(x: Float[Array, "..."]) -> Float[Array, "..."]:
        # Not a cast: XLA may leave out casts that only lose precision.
        return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)

    slopes = rounded(jnp.asarray(alibi_slopes(num_heads)))
    positions = rounded(key_positions.astype(jnp.float32))

    # [1, N, 1] * [B, 1, S] -> [B, N, S]
    products = slopes[None, :, None] * positions[:, None]
    products = rounded(products)
    # [B, N, S] -> [B, N, 1, S]: the bias is the same for all queries.
    bias = products[:, :, None]
    return bias / math.sqrt(head_dim)


def distance_buckets(
    config: PositionConfig, distances: Int[Array, "..."], bidirectional: bool
) -> Int[Array, "..."]:
    """Returns the bucket of each distance p_s − p_t: one per distance while they are small, then
    growing with its log.

    Args:
      config: how many buckets, and from which distance on all share the last.
      distances: key position less query position.
      bidirectional: whether attention goes both ways; each direction then has half of the buckets.
        Else keys that come later share the bucket of distance 0.

    Source: Raffel et al. 2020, arXiv:1910.10683, section 2.1, with the arithmetic of the released
        code.
    """
    num_buckets = config.num_buckets
    if bidirectional:
        num_buckets = num_buckets // 2
    table = jnp.asarray(_bucket_table(num_buckets, config.max_distance))
    if not bidirectional:
        backward = jnp.maximum(-distances, 0)
        backward = jnp.minimum(backward, config.max_distance)
        return table[backward]

    # 8 buckets: keys before the query, and itself, have the buckets 0 to 3, later keys 4 to 7.
    absolute = jnp.abs(distances)
    absolute = jnp.minimum(absolute, config.max_distance)
    buckets = table[absolute]
    is_later = distances > 0
    return jnp.where(is_later, buckets + num_buckets, buckets)


def _bucket_table(num_buckets: int, max_distance: int) -> Int[np.ndarray, " distances"]:
    """Returns the bucket of the distances 0 to `max_distance` in one direction."""
    num_exact = num_buckets // 2
    distances = np.arange(1, max_distance + 1, dtype=np.float32)
    # 8 buckets up to distance 16: 0 to 3 have one each, then 4 4 5 5 6 6 6 6 and 7 for the rest.
    log_range = math.log(max_distance / num_exact)
    log_ratio = np.log(distances / num_exact) / log_range
    num_log = num_buckets - num_exact
    log_index = (log_ratio * num_log).astype(np.int32)
    by_log = np.minimum(num_exact + log_index, num_buckets - 1)

    is_exact = distances < num_exact
    buckets = np.where(is_exact, distances.astype(np.int32), by_log)
    # Distance 0 is in bucket 0.
    table = np.concatenate([[0], buckets])
    return table.astype(np.int32)

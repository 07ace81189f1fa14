"""From logits to the next token: penalties, truncation, one draw per sequence."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from research.core.errors import UserError
from research.core.random import SEEDS


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """Settings of sampling from a model.

    Attributes:
      max_tokens: new tokens at most.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: keeps the k likeliest tokens, and those as likely as the last of them; 0 keeps all.
      top_p: keeps the fewest likeliest tokens that together reach this probability; 1 keeps all.
      min_p: keeps tokens of at least this fraction of the likeliest one's probability; 0 keeps all.
      repetition_penalty: above 1 makes tokens that the text already has less likely; in
          [1e-30, 1e30].
      seed: of the first sequence, in [0, 2⁶⁴); the next ones take the next numbers, and 0 after the
          last.
      stop: strings that end a text; they are not part of it.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # Within its bounds a repetition penalty leaves logits finite in float32.
        for name, holds, constraint in (
            ("max_tokens", self.max_tokens >= 1, "be at least 1"),
            ("temperature", self.temperature >= 0, "not be below 0"),
            ("top_k", self.top_k >= 0, "not be below 0"),
            ("top_p", 0 < self.top_p <= 1, "lie in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "lie in [0, 1]"),
            (
                "repetition_penalty",
                1e-30 <= self.repetition_penalty <= 1e30,
                "lie in [1e-30, 1e30]",
            ),
            ("seed", 0 <= self.seed < SEEDS, f"lie in [0, {SEEDS})"),
            ("stop", all(self.stop), "hold no empty string"),
        ):
            if not holds:
                raise UserError(name, getattr(self, name), f"must {constraint}.")


@flax.struct.dataclass
class SamplingParams:
    """The settings of each row of a batch, as arrays: rows may differ, and other values need no new
    compilation.

    Attributes:
      temperature, top_k, top_p, min_p, repetition_penalty: as of `SamplingConfig`.
    """

    temperature: Float[Array, "B"]
    top_k: Int[Array, "B"]
    top_p: Float[Array, "B"]
    min_p: Float[Array, "B"]
    repetition_penalty: Float[Array, "B"]

    @classmethod
    def of(cls, configs: Sequence[SamplingConfig]) -> "SamplingParams":
        """Returns the settings of rows with these configs."""
        smallest = float(np.finfo(np.float32).tiny)
        largest = float(np.finfo(np.float32).max)
        temperatures = []
        for config in configs:
            temperature = config.temperature
            if temperature > 0:
                # One that float32 rounds to 0 is low, but not greedy; one that it rounds to
                # infinity is high.
                temperature = min(max(temperature, smallest), largest)
            temperatures.append(temperature)

        # No vocabulary has more ids than an int32 can count.
        top_k = [min(config.top_k, np.iinfo(np.int32).max) for config in configs]
        # With top_p = 0 no token would stay, not even the likeliest.
        top_p = [max(config.top_p, smallest) for config in configs]
        min_p = [config.min_p for config in configs]
        penalties = [config.repetition_penalty for config in configs]
        return cls(
            temperature=jnp.asarray(temperatures, jnp.float32),
            top_k=jnp.asarray(top_k, jnp.int32),
            top_p=jnp.asarray(top_p, jnp.float32),
            min_p=jnp.asarray(min_p, jnp.float32),
            repetition_penalty=jnp.asarray(penalties, jnp.float32),
        )


def penalize(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Divides positive logits of seen tokens by the row's penalty and multiplies negative ones by
    it.

    Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1, with the usual correction for
        negative logits.
    """
    penalty = penalty[:, None]
    is_positive = logits > 0
    divided = logits / penalty
    multiplied = logits * penalty
    penalized = jnp.where(is_positive, divided, multiplied)
    return jnp.where(seen, penalized, logits)


def truncate(logits: Float[Array, "B V"], params: SamplingParams) -> Float[Array, "B V"]:
    """Sets the logits of tokens that a row's top-k, top-p or min-p leave out to −∞; the likeliest
    token always stays.

    Tokens as likely as the last one that is kept stay too, so ties may keep more than `top_k`. A
    rule that no row of the batch uses is not computed.

    Source: top-p: Holtzman et al. 2019, arXiv:1904.09751, section 3.1; min-p: Nguyen et al. 2024,
        arXiv:2407.01082.
    """
    vocab = logits.shape[-1]
    is_limited = params.top_k > 0
    uses_top_k = is_limited & (params.top_k < vocab)
    uses_top_p = params.top_p < 1

    def keep_top_k(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        # Rows without top-k have k = V; any number in [1, V] would do.
        k = jnp.where(uses_top_k, params.top_k, vocab)
        kth = kth_largest(logits, k)
        return _leave_out(logits, kth, uses_top_k)

    def keep_top_p(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        least = least_in_nucleus(logits, params.top_p)
        return _leave_out(logits, least, uses_top_p)

    def keep_all(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        return logits

    any_top_k = jnp.any(uses_top_k)
    logits = jax.lax.cond(any_top_k, keep_top_k, keep_all, logits)
    any_top_p = jnp.any(uses_top_p)
    logits = jax.lax.cond(any_top_p, keep_top_p, keep_all, logits)

    # p >= min_p · max p, as logits. With min_p = 0 the bound is log 0 = −∞, which keeps all.
    likeliest = jnp.max(logits, axis=-1)
    least = likeliest + jnp.log(params.min_p)
    is_below = logits < least[:, None]
    return jnp.where(is_below, -jnp.inf, logits)


def _leave_out(
    logits: Float[Array, "B V"], least: Float[Array, "B"], applies: Bool[Array, "B"]
) -> Float[Array, "B V"]:
    """Sets logits below the row's least one to −∞, in the rows that a rule applies to."""
    is_below = logits < least[:, None]
    left_out = applies[:, None] & is_below
    return jnp.where(left_out, -jnp.inf, logits)


def kth_largest(logits: Float[Array, "B V"], k: Int[Array, "B"]) -> Float[Array, "B"]:
    """Returns the k-th largest logit of each row, k in [1, V]; equal ones are counted separately.

    A bisection over the 32 bits of a number, which reads the row 32 times, instead of a sort.
    """
    # [B, V] floats -> [B, V] integers in the same order.
    logits = logits.astype(jnp.float32)
    bits = jax.lax.bitcast_convert_type(logits, jnp.int32)
    ordered = _ordered_bits(bits)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        # Their mean, rounded up, without the sum of two int32, which would overflow.
        half_of_difference = (low ^ high) >> 1
        middle = (low | high) - half_of_difference
        at_least_middle = ordered >= middle[:, None]
        count = jnp.sum(at_least_middle, axis=-1)
        has_k = count >= k
        low = jnp.where(has_k, middle, low)
        high = jnp.where(has_k, high, middle - 1)
        return low, high

    limits = jnp.iinfo(jnp.int32)
    lowest = jnp.full_like(k, limits.min)
    highest = jnp.full_like(k, limits.max)
    kth, _ = jax.lax.fori_loop(0, 32, halve, (lowest, highest))
    kth_bits = _ordered_bits(kth)
    return jax.lax.bitcast_convert_type(kth_bits, jnp.float32)


def _ordered_bits(bits: Int[Array, "..."]) -> Int[Array, "..."]:
    """Maps the bits of floats to integers of the same order, and back: those of negative floats are
    inverted, but for the sign.
    """
    is_negative = bits < 0
    inverted = bits ^ 0x7FFFFFFF
    return jnp.where(is_negative, inverted, bits)


def least_in_nucleus(logits: Float[Array, "B V"], top_p: Float[Array, "B"]) -> Float[Array, "B"]:
    """Returns the least logit of the nucleus of each row: the fewest likeliest tokens that together
    reach its `top_p`.
    """
    # Probabilities [0.5, 0.3, 0.2] come after [0, 0.5, 0.8]; top_p = 0.7 keeps the first two.
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    up_to = jnp.cumsum(probabilities, axis=-1)
    before = up_to - probabilities
    in_nucleus = before < top_p[:, None]
    kept = jnp.where(in_nucleus, ordered, jnp.inf)
    return jnp.min(kept, axis=-1)


def draw(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    keys: Key[Array, "B"],
    positions: Int[Array, "B"],
    params: SamplingParams,
) -> Int[Array, "B"]:
    """Returns the next token of each sequence.

    The draw of a sequence depends on its own key, position and settings alone, not on the rest of
    the batch.

    Args:
      logits: float32.
      seen: which ids each sequence has, prompt included.
      keys: one per sequence.
      positions: of the token that is drawn.
      params: the settings of each sequence.
    """
    logits = penalize(logits, seen, params.repetition_penalty)
    greedy = params.temperature == 0

    # The likeliest token has the logit 0, which stays 0 at temperatures near 0.
    likeliest = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - likeliest
    temperature = jnp.where(greedy, 1.0, params.temperature)
    scaled = shifted / temperature[:, None]

    def gumbel_row(key: Key[Array, ""]) -> Float[Array, "V"]:
        shape = logits.shape[1:]
        return jax.random.gumbel(key, shape, jnp.float32)

    def gumbel(_: None) -> Float[Array, "B V"]:
        fold_in_rows = jax.vmap(jax.random.fold_in)
        token_keys = fold_in_rows(keys, positions)
        noise = jax.vmap(gumbel_row)(token_keys)
        return jnp.where(greedy[:, None], 0.0, noise)

    def zeros(_: None) -> Float[Array, "B V"]:
        return jnp.zeros_like(scaled)

    # The largest of logits with Gumbel noise is a draw from their softmax, as in
    # `jax.random.categorical`; without noise it is the likeliest token. One argmax serves both: a
    # second one would take three times as long.
    all_greedy = jnp.all(greedy)
    noise = jax.lax.cond(all_greedy, zeros, gumbel, None)
    truncated = truncate(scaled, params)
    token = jnp.argmax(truncated + noise, axis=-1)
    return token.astype(jnp.int32)

"""From logits to the next token: penalties, truncation, one draw a sequence."""

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
    """How text is drawn from a model.

    Attributes:
      max_tokens: new tokens at most.
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: keeps the k likeliest tokens, and those as likely as the last of them; 0 keeps all.
      top_p: keeps the fewest likeliest tokens that together reach this probability; 1 keeps all.
      min_p: keeps tokens of at least this fraction of the likeliest one's probability; 0 keeps all.
      repetition_penalty: above 1 makes tokens that stand in the text already less likely; in
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
    """The settings of each row of a batch, as arrays: another value compiles nothing, and rows may
    differ.

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
        # A temperature that float32 rounds to 0 is low, but not greedy; one that it rounds to
        # infinity is high.
        lowest, highest = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
        temperatures = [
            min(max(c.temperature, lowest), highest) if c.temperature > 0 else 0.0 for c in configs
        ]
        return cls(
            temperature=jnp.asarray(temperatures, jnp.float32),
            # A row has no more ids than an int32 counts.
            top_k=jnp.asarray([min(c.top_k, np.iinfo(np.int32).max) for c in configs], jnp.int32),
            # At 0 no token would stay, not even the likeliest.
            top_p=jnp.asarray([max(c.top_p, lowest) for c in configs], jnp.float32),
            min_p=jnp.asarray([c.min_p for c in configs], jnp.float32),
            repetition_penalty=jnp.asarray([c.repetition_penalty for c in configs], jnp.float32),
        )


def penalize(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Divides positive logits of seen tokens by the row's penalty and multiplies negative ones with
    it.

    Source: Keskar et al. 2019 (CTRL), arXiv:1909.05858, section 4.1, with the sign fix that is in
        use everywhere.
    """
    penalty = penalty[:, None]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def truncate(logits: Float[Array, "B V"], params: SamplingParams) -> Float[Array, "B V"]:
    """Sets the logits of tokens that a row's top-k, top-p or min-p leave out to −∞; the likeliest
    token always stays.

    Tokens as likely as the last one that is kept stay too, so ties may keep more than `top_k`. What
    no row of the batch asks for is not computed.

    Source: top-p: Holtzman et al. 2019, arXiv:1904.09751, section 3.1; min-p: Nguyen et al. 2024,
        arXiv:2407.01082.
    """
    vocab = logits.shape[-1]
    limits_k = (params.top_k > 0) & (params.top_k < vocab)
    limits_p = params.top_p < 1

    def keep_top_k(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        kth = largest(logits, jnp.where(limits_k, params.top_k, vocab))
        return jnp.where(limits_k[:, None] & (logits < kth[:, None]), -jnp.inf, logits)

    def keep_top_p(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        last = nucleus_end(logits, params.top_p)
        return jnp.where(limits_p[:, None] & (logits < last[:, None]), -jnp.inf, logits)

    logits = jax.lax.cond(jnp.any(limits_k), keep_top_k, lambda logits: logits, logits)
    logits = jax.lax.cond(jnp.any(limits_p), keep_top_p, lambda logits: logits, logits)
    # log 0 = −∞ leaves out nothing.
    floor = jnp.max(logits, axis=-1) + jnp.log(params.min_p)
    return jnp.where(logits < floor[:, None], -jnp.inf, logits)


def largest(logits: Float[Array, "B V"], k: Int[Array, "B"]) -> Float[Array, "B"]:
    """Returns the k-th largest logit of each row, k in [1, V]; equal ones count one by one.

    A bisection over the 32 bits of a number, which reads the row 32 times, in the place of a sort.
    """
    bits = jax.lax.bitcast_convert_type(logits.astype(jnp.float32), jnp.int32)
    # As integers, floats are in order: positive ones as they are, negative ones once all bits but
    # the sign are turned.
    ordered = jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)

    def halve(_: Any, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        # The mean rounded up: the sum of two int32 would overflow.
        middle = (low | high) - ((low ^ high) >> 1)
        enough = jnp.sum(ordered >= middle[:, None], axis=-1) >= k
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    limits = jnp.iinfo(jnp.int32)
    start = (jnp.full_like(k, limits.min), jnp.full_like(k, limits.max))
    found, _ = jax.lax.fori_loop(0, 32, halve, start)
    return jax.lax.bitcast_convert_type(
        jnp.where(found < 0, found ^ 0x7FFFFFFF, found), jnp.float32
    )


def nucleus_end(logits: Float[Array, "B V"], top_p: Float[Array, "B"]) -> Float[Array, "B"]:
    """Returns the least logit of the fewest likeliest tokens of each row that together reach its
    `top_p`.
    """
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    return jnp.min(jnp.where(before < top_p[:, None], ordered, jnp.inf), axis=-1)


def draw(
    logits: Float[Array, "B V"],
    seen: Bool[Array, "B V"],
    keys: Key[Array, "B"],
    positions: Int[Array, "B"],
    params: SamplingParams,
) -> Int[Array, "B"]:
    """Returns the next token of each sequence.

    The draw of a sequence depends on its own key, position and settings alone: the rest of the
    batch changes nothing.

    Args:
      logits: float32.
      seen: which tokens stand in each sequence already, prompt included.
      keys: one a sequence.
      positions: of the token that is drawn.
      params: how.
    """
    logits = penalize(logits, seen, params.repetition_penalty)
    greedy = params.temperature == 0
    # The likeliest token has the logit 0, which stays 0 at temperatures near 0.
    temperature = jnp.where(greedy, 1.0, params.temperature)
    scaled = (logits - jnp.max(logits, axis=-1, keepdims=True)) / temperature[:, None]

    def gumbel(_: None) -> Float[Array, "B V"]:
        steps = jax.vmap(jax.random.fold_in)(keys, positions)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(steps)
        return jnp.where(greedy[:, None], 0.0, noise)

    # The largest of logits with Gumbel noise is a draw from their softmax, as in
    # `jax.random.categorical`; without noise it is the likeliest token. One argmax for both: a
    # second one beside it takes three times as long.
    noise = jax.lax.cond(jnp.all(greedy), lambda _: jnp.zeros_like(scaled), gumbel, None)
    return jnp.argmax(truncate(scaled, params) + noise, axis=-1).astype(jnp.int32)

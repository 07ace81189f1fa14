"""From logits to the next token: penalties, truncation, one draw per sequence."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

from research.inference.id_masks import num_words, unpack_bits
from research.inference.sampling_config import SamplingParams


@flax.struct.dataclass
class IdRules:
    """What holds for each id in each row.

    Attributes:
      in_prompt: whether the prompt has it.
      counts: how often the answer has it.
      bias: what is added to its logit.
      is_end: whether it ends the text.
      first_end: the first position that an end of text may have.
      allowed: whether it may be drawn at all, a mask as of `id_masks`.
    """

    in_prompt: Bool[Array, "B V"]
    counts: Int[Array, "B V"]
    bias: Float[Array, "B V"]
    is_end: Bool[Array, "B V"]
    first_end: Int[Array, "B"]
    allowed: UInt32[Array, "B *drafts words"]

    @classmethod
    def none(cls, rows: int, vocab: int) -> "IdRules":
        """Returns rules that allow all ids and change no logit."""
        shape = (rows, vocab)
        words = num_words(vocab)
        return cls(
            in_prompt=jnp.zeros(shape, bool),
            counts=jnp.zeros(shape, jnp.int32),
            bias=jnp.zeros(shape, jnp.float32),
            is_end=jnp.zeros(shape, bool),
            first_end=jnp.zeros(rows, jnp.int32),
            allowed=jnp.full((rows, words), 2**32 - 1, jnp.uint32),
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
    """Sets the logits of tokens that a row's top-k, top-p, min-p or typical leave out to −∞. The
    likeliest token always stays, but for typical.

    Tokens as likely as the last one that is kept stay too, so ties may keep more than `top_k`. A
    rule that no row of the batch uses is not computed.

    Source: top-p: Holtzman et al. 2019, arXiv:1904.09751, section 3.1; min-p: Nguyen et al. 2024,
        arXiv:2407.01082; typical: Meister et al. 2022, arXiv:2202.00666, section 4.
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
    logits = jnp.where(is_below, -jnp.inf, logits)

    uses_typical = params.typical_p < 1

    def keep_typical(logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
        distance, farthest = least_typical(logits, params.typical_p)
        is_far = distance > farthest[:, None]
        left_out = uses_typical[:, None] & is_far
        return jnp.where(left_out, -jnp.inf, logits)

    any_typical = jnp.any(uses_typical)
    return jax.lax.cond(any_typical, keep_typical, keep_all, logits)


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


def least_typical(
    logits: Float[Array, "B V"], typical_p: Float[Array, "B"]
) -> tuple[Float[Array, "B V"], Float[Array, "B"]]:
    """Returns how far the surprise of each token is from the entropy, and the largest such distance
    among the fewest tokens, nearest first, that together reach the row's `typical_p`.
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    probabilities = jnp.exp(logprobs)
    # A token that is left out already has p = 0, and adds 0 · ∞ = 0 to the entropy.
    terms = jnp.where(probabilities > 0, probabilities * logprobs, 0.0)
    entropy = -jnp.sum(terms, axis=-1, keepdims=True)
    distance = jnp.abs(-logprobs - entropy)

    ordered, mass = jax.lax.sort((distance, probabilities), num_keys=1)
    before = jnp.cumsum(mass, axis=-1) - mass
    is_typical = before < typical_p[:, None]
    farthest = jnp.max(jnp.where(is_typical, ordered, 0.0), axis=-1)
    return distance, farthest


def apply_rules(
    logits: Float[Array, "B V"],
    rules: IdRules,
    positions: Int[Array, "B"],
    params: SamplingParams,
) -> Float[Array, "B V"]:
    """Returns logits with penalties and bias, and −∞ for ids that may not be drawn.

    Args:
      logits: float32.
      rules: of each row.
      positions: of the token that is drawn.
      params: the settings of each row.
    """
    seen = rules.in_prompt | (rules.counts > 0)
    logits = penalize(logits, seen, params.repetition_penalty)
    counts = rules.counts.astype(jnp.float32)
    logits -= params.frequency_penalty[:, None] * counts
    logits -= params.presence_penalty[:, None] * jnp.minimum(counts, 1.0)
    logits += rules.bias
    too_early = rules.is_end & (positions < rules.first_end)[:, None]
    allowed = unpack_bits(rules.allowed, logits.shape[1]) & ~too_early
    return jnp.where(allowed, logits, -jnp.inf)


def process(logits: Float[Array, "B V"], params: SamplingParams) -> Float[Array, "B V"]:
    """Returns logits whose softmax a token is drawn from: by temperature, then cut by top-k, top-p,
    min-p and typical. The likeliest of them is 0.
    """
    # The likeliest token has the logit 0, which stays 0 at temperatures near 0.
    likeliest = jnp.max(logits, axis=-1, keepdims=True)
    shifted = logits - likeliest
    temperature = jnp.where(params.temperature == 0, 1.0, params.temperature)
    return truncate(shifted / temperature[:, None], params)


def choose(
    processed: Float[Array, "B V"],
    keys: Key[Array, "B"],
    positions: Int[Array, "B"],
    params: SamplingParams,
) -> Int[Array, "B"]:
    """Returns the next token of each sequence: the likeliest of its processed logits where its
    temperature is 0, else a draw from their softmax with the noise of its key and position.
    """
    greedy = params.temperature == 0

    def gumbel_row(key: Key[Array, ""]) -> Float[Array, "V"]:
        shape = processed.shape[1:]
        return jax.random.gumbel(key, shape, jnp.float32)

    def gumbel(_: None) -> Float[Array, "B V"]:
        fold_in_rows = jax.vmap(jax.random.fold_in)
        token_keys = fold_in_rows(keys, positions)
        noise = jax.vmap(gumbel_row)(token_keys)
        return jnp.where(greedy[:, None], 0.0, noise)

    def zeros(_: None) -> Float[Array, "B V"]:
        return jnp.zeros_like(processed)

    # The largest of logits with Gumbel noise is a draw from their softmax, as in
    # `jax.random.categorical`; without noise it is the likeliest token. One argmax serves both: a
    # second one would take three times as long.
    all_greedy = jnp.all(greedy)
    noise = jax.lax.cond(all_greedy, zeros, gumbel, None)
    token = jnp.argmax(processed + noise, axis=-1)
    return token.astype(jnp.int32)


def draw(
    logits: Float[Array, "B V"],
    rules: IdRules,
    keys: Key[Array, "B"],
    positions: Int[Array, "B"],
    params: SamplingParams,
) -> Int[Array, "B"]:
    """Returns the next token of each sequence.

    In this order: penalties of repetition, frequency and presence; bias; ids that may not be drawn;
    temperature; top-k; top-p; min-p; typical. The draw of a sequence depends on its own key,
    position and settings alone, not on the rest of the batch.

    Args:
      logits: float32.
      rules: what holds for each id in each sequence.
      keys: one per sequence.
      positions: of the token that is drawn.
      params: the settings of each sequence.
    """
    edited = apply_rules(logits, rules, positions, params)
    return choose(process(edited, params), keys, positions, params)

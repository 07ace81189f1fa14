"""The router of a mixture of experts: which experts a token goes to, and the router loss."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.models.config import ExpertsConfig
from research.models.reports import ExpertCounts
from research.parallel.shard_map import per_token


def route(
    config: ExpertsConfig,
    logits: Float[Array, "B T E"],
    selection_bias: Float[Array, "E"] | None,
    real: Bool[Array, "B T"] | None,
) -> tuple[Int[Array, "B T choices"], Float[Array, "B T choices"], Float[Array, ""]]:
    """Returns the experts of each token, best first, their weights, and the router loss.

    Args:
      config: the mixture.
      logits: of the router, float32.
      selection_bias: added to the scores for the choice alone; it has no gradient, but may follow
        the expert load (`optim.balancing`).
      real: tokens that count for the loss; None is all of them.
    """
    scores = _scores(config, logits)

    ranked = scores
    if selection_bias is not None:
        # [E] -> [1, 1, E]
        bias = jax.lax.stop_gradient(selection_bias)[None, None]
        ranked = scores + bias
    if config.num_groups > 1:
        mask_groups = functools.partial(_mask_groups, config)
        ranked = per_token(mask_groups, ranked)

    # The weights are the scores without the selection bias.
    best = functools.partial(_best, count=config.experts_per_token)
    chosen = per_token(best, ranked)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.renormalize:
        total = weights.sum(axis=-1, keepdims=True)
        # All sigmoids may be zero.
        weights = weights / (total + 1e-20)
    weights = weights * config.scale

    router_loss = _router_loss(config, logits, scores, chosen, real)
    return chosen, weights, router_loss


def keep_within_capacity(
    config: ExpertsConfig, chosen: Int[Array, "B T choices"], real: Bool[Array, "B T"] | None
) -> Int[Array, "B T choices"]:
    """Returns the chosen experts, with E in the place of choices that are dropped.

    Where nothing bounds the choices, they stay as they are. Else those of padding are dropped, and
    those that find their expert full; see `ExpertsConfig.capacity_factor`.

    Args:
      config: the mixture.
      chosen: the experts of each token, best first.
      real: tokens that are no padding; None is all of them.
    """
    if config.capacity_factor is None and config.buffer_factor is None:
        return chosen
    num_experts = config.num_experts
    if real is not None:
        # [B, T] -> [B, T, 1]
        real = real[..., None]
        chosen = jnp.where(real, chosen, num_experts)
    if config.capacity_factor is None:
        return chosen

    batch, length, choices = chosen.shape
    even_share = length * choices / num_experts
    capacity = math.ceil(config.capacity_factor * even_share)
    taken = jnp.zeros((batch, 1, num_experts), jnp.int32)
    kept = []
    for rank in range(choices):
        expert = chosen[..., rank]
        # [B, T] -> [B, T, E]; E itself is no expert, and picks none.
        picked = jax.nn.one_hot(expert, num_experts, dtype=jnp.int32)
        # Tokens pick [1, 0, 1]: their places at expert 1 are 0 and 1, at expert 0 it is 0.
        place = taken + jnp.cumsum(picked, axis=1) - picked
        own_place = jnp.sum(place * picked, axis=-1)
        has_place = own_place < capacity
        of_rank = jnp.where(has_place, expert, num_experts)
        kept.append(of_rank)

        # Later ranks come after all tokens of this one.
        picked_by_row = picked.sum(axis=1, keepdims=True)
        taken = taken + picked_by_row
    return jnp.stack(kept, axis=-1)


def count_experts(
    config: ExpertsConfig,
    logits: Float[Array, "B T E"],
    chosen: Int[Array, "B T choices"],
    kept: Int[Array, "B T choices"],
    real: Bool[Array, "B T"] | None,
) -> ExpertCounts:
    """Returns what a layer reports of its experts.

    Args:
      config: the mixture.
      logits: of the router.
      chosen: the experts of each token.
      kept: the same with E for those that are dropped.
      real: tokens that count; None is all of them.
    """
    counts = _counts(real, chosen.shape[:2])
    # [B, T, choices] -> [B, T, choices, E]: expert 1 of 3 is [0, 1, 0].
    picked = jax.nn.one_hot(chosen, config.num_experts)
    load = jnp.einsum("bt,btce->e", counts, picked)

    is_dropped = kept == config.num_experts
    is_dropped = is_dropped.astype(jnp.float32)
    scores = _scores(config, logits)
    shares = _shares(scores)
    entropy = jax.scipy.special.entr(shares)
    entropy = entropy.sum(axis=-1)
    return ExpertCounts(
        load=load,
        dropped=jnp.einsum("bt,btc->", counts, is_dropped),
        entropy=jnp.sum(counts * entropy),
        tokens=jnp.sum(counts),
    )


def _counts(real: Bool[Array, "B T"] | None, shape: tuple[int, int]) -> Float[Array, "B T"]:
    """Returns 1 for each token that counts, and 0 for the others; without `real` all count."""
    if real is None:
        return jnp.ones(shape)
    return real.astype(jnp.float32)


def _best(scores: Float[Array, "B T E"], count: int) -> Int[Array, "B T choices"]:
    """Returns the experts with the highest scores, best first."""
    _, best = jax.lax.top_k(scores, count)
    return best


def _scores(config: ExpertsConfig, logits: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    """Returns the score of each expert."""
    score = jax.nn.softmax if config.score == "softmax" else jax.nn.sigmoid
    return score(logits)


def _shares(scores: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    """Returns scores that add up to 1."""
    total = scores.sum(axis=-1, keepdims=True)
    return scores / total


def _mask_groups(config: ExpertsConfig, ranked: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    """Returns the scores with -inf for experts outside of each token's best groups.

    Source: DeepSeek-AI 2024 (DeepSeek-V3), arXiv:2412.19437, section 2.1.2, node-limited routing,
    as released: a group counts by the sum of its two best scores.
    """
    # [B, T, E] -> [B, T, groups, experts of a group]
    *lead, _ = ranked.shape
    grouped = ranked.reshape(*lead, config.num_groups, -1)
    best_two, _ = jax.lax.top_k(grouped, 2)
    group_scores = best_two.sum(axis=-1)
    _, groups = jax.lax.top_k(group_scores, config.groups_per_token)

    # Groups [0, 2] of 4 -> [True, False, True, False].
    one_hot = jax.nn.one_hot(groups, config.num_groups, dtype=bool)
    allowed = one_hot.any(axis=-2)
    # [B, T, groups] -> [B, T, groups, 1]
    allowed = allowed[..., None]
    masked = jnp.where(allowed, grouped, -jnp.inf)
    return masked.reshape(ranked.shape)


def _router_loss(
    config: ExpertsConfig,
    logits: Float[Array, "B T E"],
    scores: Float[Array, "B T E"],
    chosen: Int[Array, "B T choices"],
    real: Bool[Array, "B T"] | None,
) -> Float[Array, ""]:
    """Returns balance_weight · E Σ_e f_e P_e + z_weight · mean(logsumexp²), f the share of choices,
    P of scores.
    """
    # Every real token has the weight 1 / their number: real [T, T, F] -> [1/2, 1/2, 0].
    counts = _counts(real, logits.shape[:2])
    num_real = jnp.maximum(counts.sum(), 1.0)
    weight = counts / num_real

    loss = jnp.zeros(())
    if config.balance_weight:
        # [B, T, choices] -> [B, T, choices, E] -> [B, T, E]
        picked = jax.nn.one_hot(chosen, config.num_experts)
        picked = picked.mean(axis=-2)
        shares = _shares(scores)

        # [B, T], [B, T, E] -> [E]
        score_share = jnp.einsum("bt,bte->e", weight, shares)
        choice_share = jnp.einsum("bt,bte->e", weight, picked)
        dot = jnp.sum(choice_share * score_share)
        balance_loss = config.num_experts * dot
        loss = loss + config.balance_weight * balance_loss
    if config.z_weight:
        log_z = jax.nn.logsumexp(logits, axis=-1)
        z_loss = jnp.sum(weight * log_z**2)
        loss = loss + config.z_weight * z_loss
    return loss

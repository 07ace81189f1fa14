"""The router of a mixture of experts: which experts a token goes to, and the router loss."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.models.config import ExpertsConfig


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
    score = jax.nn.softmax if config.score == "softmax" else jax.nn.sigmoid
    scores = score(logits)

    ranked = scores
    if selection_bias is not None:
        # [E] -> [1, 1, E]
        bias = jax.lax.stop_gradient(selection_bias)[None, None]
        ranked = scores + bias
    if config.num_groups > 1:
        ranked = _mask_groups(config, ranked)

    # The weights are the scores without the selection bias.
    _, chosen = jax.lax.top_k(ranked, config.experts_per_token)
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.renormalize:
        total = weights.sum(axis=-1, keepdims=True)
        # All sigmoids may be zero.
        weights = weights / (total + 1e-20)
    weights = weights * config.scale

    router_loss = _router_loss(config, logits, scores, chosen, real)
    return chosen, weights, router_loss


def expert_load(
    num_experts: int, chosen: Int[Array, "B T choices"], real: Bool[Array, "B T"] | None
) -> Float[Array, "E"]:
    """Returns how many real tokens chose each expert.

    Args:
      num_experts: E.
      chosen: the experts of each token.
      real: tokens that count; None is all of them.
    """
    # [B, T, choices] -> [B, T, choices, E]: expert 1 of 3 is [0, 1, 0].
    picked = jax.nn.one_hot(chosen, num_experts)
    if real is not None:
        counts = real[..., None, None].astype(picked.dtype)
        picked = picked * counts
    return jnp.sum(picked, axis=(0, 1, 2))


def _mask_groups(config: ExpertsConfig, ranked: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    """Returns the scores with -inf for experts outside of each token's best groups.

    Source: DeepSeek-AI 2024 (DeepSeek-V3), arXiv:2412.19437, section 2.1.2, node-limited routing,
    as released: a group counts by the sum of its two best scores.
    """
    # [B, T, E] -> [B, T, groups, experts of a group]
    grouped = ranked.reshape(*ranked.shape[:-1], config.num_groups, -1)
    best_two, _ = jax.lax.top_k(grouped, 2)
    group_scores = best_two.sum(axis=-1)
    _, groups = jax.lax.top_k(group_scores, config.groups_per_token)

    # Groups [0, 2] of 4 -> [True, False, True, False].
    one_hot = jax.nn.one_hot(groups, config.num_groups, dtype=bool)
    allowed = one_hot.any(axis=-2)
    masked = jnp.where(allowed[..., None], grouped, -jnp.inf)
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
    weight = jnp.ones(logits.shape[:2]) if real is None else real.astype(jnp.float32)
    num_real = jnp.maximum(weight.sum(), 1.0)
    weight = weight / num_real

    loss = jnp.zeros(())
    if config.balance_weight:
        # [B, T, choices] -> [B, T, choices, E] -> [B, T, E]
        picked = jax.nn.one_hot(chosen, config.num_experts)
        picked = picked.mean(axis=-2)
        shares = scores / scores.sum(axis=-1, keepdims=True)

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

"""The two passes of attention as functions, for callers that put results over parts of the keys
together.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms

# From here on a logsumexp says that a query attends to no key. Implementations give +inf, or the
# size of the score that they give to hidden keys.
EMPTY = 1e20


class ForwardResult(NamedTuple):
    """What the forward pass gives, and the backward pass needs.

    Attributes:
      out: the attention.
      lse: logsumexp of each row of scores, sink included; at least `EMPTY` where a query attends to
          no key, so that all its weights exp(s − lse) are 0.
    """

    out: Float[Array, "B T N H"]
    lse: Float[Array, "B T N"]


@runtime_checkable
class Passes(Protocol):
    """An implementation of attention whose passes can be called one by one."""

    def forward_pass(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: AttentionMask,
        terms: ScoreTerms,
    ) -> ForwardResult:
        """Returns the attention and the logsumexp of its scores."""
        ...

    def backward_pass(
        self,
        q: Float[Array, "B T N H"],
        k: Float[Array, "B S K H"],
        v: Float[Array, "B S K H"],
        mask: AttentionMask,
        terms: ScoreTerms,
        result: ForwardResult,
        g: Float[Array, "B T N H"],
    ) -> tuple[Array, Array, Array, ScoreTerms]:
        """Returns the gradients of q, k, v and the terms.

        The keys may be a part of those that `result` was computed over: then these are the
        gradients of the part, and those of q and the terms add up over all parts.
        """
        ...


def merge(a: ForwardResult, b: ForwardResult) -> ForwardResult:
    """Returns the attention over the keys of both; `out` is in float32.

    out = Σ_i out_i exp(lse_i − lse),  lse = log Σ_i exp(lse_i)

    Source: Rabe & Staats 2021, arXiv:2112.05682, section 2.
    """
    a_lse = _as_empty_sum(a.lse)
    b_lse = _as_empty_sum(b.lse)
    lse = jnp.logaddexp(a_lse, b_lse)
    both_empty = jnp.isneginf(lse)

    # Where both are empty, -inf − -inf would not be a number.
    finite = jnp.where(both_empty, 0.0, lse)
    # [B, T, N] -> [B, T, N, 1]
    a_weight = jnp.exp(a_lse - finite)[..., None]
    b_weight = jnp.exp(b_lse - finite)[..., None]
    a_part = a.out.astype(jnp.float32) * a_weight
    b_part = b.out.astype(jnp.float32) * b_weight

    lse = jnp.where(both_empty, jnp.inf, lse)
    return ForwardResult(a_part + b_part, lse)


def _as_empty_sum(lse: Float[Array, "B T N"]) -> Float[Array, "B T N"]:
    """Returns −inf, the logarithm of an empty sum, where a query attends to no key."""
    is_empty = lse >= EMPTY
    return jnp.where(is_empty, -jnp.inf, lse)


def empty_result(q: Float[Array, "B T N H"]) -> ForwardResult:
    """Returns the result of queries that attend to no key."""
    out = jnp.zeros(q.shape, jnp.float32)
    lse = jnp.full(q.shape[:3], jnp.inf, jnp.float32)
    return ForwardResult(out, lse)


def with_sinks(result: ForwardResult, sinks: Float[Array, "N"]) -> ForwardResult:
    """Returns the result of scores without sinks, with sinks in the denominator."""
    # [N] -> [B, T, N]; a sink has the value 0, so its own result is 0.
    logits = sinks.astype(jnp.float32)
    lse = jnp.broadcast_to(logits, result.lse.shape)
    no_value = jnp.zeros_like(result.out)
    of_sinks = ForwardResult(no_value, lse)
    return merge(result, of_sinks)


def sink_gradient(
    sinks: Float[Array, "N"], result: ForwardResult, g: Float[Array, "B T N H"]
) -> Float[Array, "N"]:
    """Returns −Σ exp(sink − lse) (g · out): a sink has a weight, and the value 0."""
    products = g.astype(jnp.float32) * result.out.astype(jnp.float32)
    delta = jnp.sum(products, axis=-1)
    # [N] -> [1, 1, N]
    logits = sinks.astype(jnp.float32)[None, None]
    weights = jnp.exp(logits - result.lse)
    gradient = -jnp.sum(weights * delta, axis=(0, 1))
    return gradient.astype(sinks.dtype)

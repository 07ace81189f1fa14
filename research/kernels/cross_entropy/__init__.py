"""The loss of a language model from its last hidden states, without float32 logits of the whole
batch.
"""

from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int

from research.core.errors import UserError
from research.kernels.cross_entropy import chunked, fused, reference
from research.kernels.cross_entropy.fused import Objective
from research.kernels.cross_entropy.tiles import (
    Terms,
    default_token_chunk,
    default_vocab_chunk,
    vocabulary_share,
)
from research.kernels.weights import Weight, as_product
from research.parallel.target import platform

__all__ = [
    "Implementation",
    "Objective",
    "SummedImplementation",
    "cross_entropy",
    "summed_cross_entropy",
]

Implementation = Literal["auto", "reference", "chunked"]
SummedImplementation = Literal["auto", "reference", "chunked", "fused"]


def cross_entropy(
    hidden: Float[Array, "*batch D"],
    kernel: Weight,
    targets: Int[Array, "*batch"],
    *,
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    implementation: Implementation = "auto",
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Cross-entropy of the logits z = cap(hidden · kernel), a token.

        nll = log_z - (1 - ε) z_target - ε mean_v(z_v),   log_z = log Σ_v exp(z_v)

    It is exact too where the mesh in context shares out the vocabulary over its axis `tensor`:
    neither logits nor columns of the kernel leave their device. A vocabulary that the axis does not
    divide stays whole on each device.
    Both results are differentiable: weight `nll` outside, and add a multiple of `log_z²` for
        z-loss.

    Args:
      hidden: the last hidden states, after the final norm.
      kernel: the output embedding `[D, V]`, plain or a node, rounded to the type of `hidden`; where
        it is float32, so is its gradient. A tied table `[V, D]` is passed transposed, which copies
        nothing.
      targets: the id of the token to predict, in [0, V).
      softcap: bound of the logits, above 0; None is no bound.
      label_smoothing: ε, the share of the target distribution that is spread evenly over the
          vocabulary, in [0, 1).
      implementation: `reference` holds all logits; `chunked` (`auto`) never more than a chunk of
          them.
      token_chunk: tokens a chunk of each device's share of the batch, at least 1; None chooses by
          platform.
      vocab_chunk: vocabulary entries a chunk of each device's share of them, at least 1; None
          chooses.

    Returns:
      (nll, log_z), both float32.

    Raises:
      UserError: a chunk below 1, or a label smoothing outside of [0, 1).

    Source: label smoothing is Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    batch = targets.shape
    hidden, kernel = as_product(hidden.reshape(-1, hidden.shape[-1]), kernel)
    targets = targets.reshape(-1)
    terms = _terms(kernel.shape[1], softcap, label_smoothing, token_chunk, vocab_chunk)
    if implementation == "reference":
        nll, log_z = reference.cross_entropy(hidden, kernel, targets, softcap, label_smoothing)
    else:
        nll, log_z = chunked.cross_entropy(hidden, kernel, targets, terms)
    return nll.reshape(batch), log_z.reshape(batch)


def summed_cross_entropy(
    objective: Objective,
    hidden: Float[Array, "*batch D"],
    kernel: Weight,
    targets: Int[Array, "*batch"],
    *per_token: Float[Array, "*batch"],
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    implementation: SummedImplementation = "auto",
) -> tuple[Float[Array, ""], Any]:
    """What an objective makes of the cross-entropy of all tokens: `objective(*cross_entropy(…),
    *per_token)`.

    Told beforehand what becomes of each token's loss, it can make the gradient while the logits are
    there, and has no need to make them twice.

    Args:
      objective: takes nll, log_z and `per_token`, all of them `[M]`, and returns a sum over tokens
        and anything else. It may see some tokens at a time, so what it makes of one may not depend
        on others. It may not close over arrays that are traced.
      hidden, kernel, targets: as of `cross_entropy`.
      *per_token: more arrays over tokens, such as weights. They have no gradient.
      softcap, label_smoothing: as of `cross_entropy`.
      implementation: `fused` makes the gradient beside the loss, and wants the whole vocabulary on
        each device; `chunked` and `reference` are those of `cross_entropy`; `auto` is `fused` on
        CPU, where products are what takes the time, but for bfloat16 with more than 65,536 entries,
        and `chunked` elsewhere, where tiles of few tokens would spend it on reading the kernel.

    Returns:
      What `objective` returns. Only the sum has a gradient.

    Raises:
      UserError: as of `cross_entropy`, or `fused` for a vocabulary that is shared out.
    """
    vocab_size = kernel.shape[1]
    shared = vocabulary_share(vocab_size) < vocab_size
    if implementation == "fused" and shared:
        raise UserError(
            "implementation", "fused", "needs the whole vocabulary on each device: take 'chunked'."
        )
    hidden, kernel = as_product(hidden.reshape(-1, hidden.shape[-1]), kernel)
    targets, *per_token = (x.reshape(-1) for x in (targets, *per_token))
    fast = platform() == "cpu" and not shared and fused.is_fast(vocab_size, hidden.dtype)
    if implementation == "fused" or (implementation == "auto" and fast):
        terms = _terms(vocab_size, softcap, label_smoothing, fused.token_chunk(vocab_size), None)
        return fused.objective_of_tokens(
            objective, hidden, kernel, targets, tuple(per_token), terms
        )
    options = {
        "softcap": softcap,
        "label_smoothing": label_smoothing,
        "implementation": implementation,
    }
    losses = cross_entropy(hidden, kernel, targets, **options)
    total, more = objective(*losses, *map(jax.lax.stop_gradient, per_token))
    return total, jax.lax.stop_gradient(more)


def _terms(
    vocab_size: int,
    softcap: float | None,
    label_smoothing: float,
    token_chunk: int | None,
    vocab_chunk: int | None,
) -> Terms:
    if vocab_chunk is None:
        vocab_chunk = default_vocab_chunk(vocabulary_share(vocab_size))
    if token_chunk is None:
        token_chunk = default_token_chunk(vocab_chunk)
    if min(token_chunk, vocab_chunk) < 1:
        raise UserError(
            "token_chunk", token_chunk, f"and vocab_chunk = {vocab_chunk} must be at least 1."
        )
    if not 0 <= label_smoothing < 1:
        raise UserError("label_smoothing", label_smoothing, "must lie in [0, 1).")
    return Terms(softcap, label_smoothing, token_chunk, vocab_chunk)

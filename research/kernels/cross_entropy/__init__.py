"""The loss of a language model from its last hidden states, without float32 logits of the whole
batch.
"""

from typing import Any, Literal

import jax
from jaxtyping import Array, Float, Int

from research.core.errors import UserError
from research.kernels.cross_entropy import chunked, fused, reference
from research.kernels.cross_entropy.fused import TokenLoss
from research.kernels.cross_entropy.tiles import (
    CrossEntropyConfig,
    default_token_chunk,
    default_vocab_chunk,
    vocab_shard_size,
)
from research.kernels.weights import Weight, as_product, gradient_dtype
from research.parallel.shard_map import merge_rows
from research.parallel.target import platform

__all__ = ["Implementation", "TokenLoss", "cross_entropy"]

Implementation = Literal["auto", "reference", "chunked", "fused"]


def cross_entropy(
    token_loss: TokenLoss,
    hidden: Float[Array, "*batch D"],
    kernel: Weight,
    targets: Int[Array, "*batch"],
    *per_token: Float[Array, "*batch"],
    softcap: float | None = None,
    label_smoothing: float = 0.0,
    implementation: Implementation = "auto",
    token_chunk: int | None = None,
    vocab_chunk: int | None = None,
) -> tuple[Float[Array, ""], Any]:
    """Returns `token_loss(nll, log_z, *per_token)` of the logits z = cap(hidden · kernel).

        nll = log_z - (1 - ε) z_target - ε mean_v(z_v),   log_z = log Σ_v exp(z_v)

    The caller passes the function that sums up the tokens, and not its gradient afterwards, so that
    `fused` can compute the gradient while it has the logits. The result is exact too where the mesh
    in context shards the vocabulary over its axis `tensor`.

    Args:
      token_loss: takes nll, log_z and `per_token`, flat arrays over some of the tokens or all;
        returns a sum over tokens, which has a gradient, and auxiliary values, which have none. It
        must not close over traced arrays, and a token's part must not depend on other tokens.
      hidden: the last hidden states, after the final norm.
      kernel: the output embedding `[D, V]`, an array or a `WeightNode`, rounded to the type of
        `hidden`; where it is float32, so is its gradient. A tied table `[V, D]` is passed
        transposed.
      targets: the id of the token to predict, in [0, V).
      *per_token: more arrays over tokens, such as weights. They have no gradient.
      softcap: bound of the logits, above 0; None is no bound.
      label_smoothing: ε, the part of the target distribution that is uniform, in [0, 1).
      implementation: `reference` holds all logits; `chunked` and `fused` a tile of them. `fused`
        needs the whole vocabulary on each device. `auto` is `fused` on CPU where `fused.is_fast`
        says so, and `chunked` elsewhere.
      token_chunk: tokens of a tile, of each device's shard, at least 1; None chooses.
      vocab_chunk: vocabulary entries of a tile, at least 1; None chooses.

    Raises:
      UserError: a chunk below 1, a label smoothing outside of [0, 1), or `fused` for a sharded
        vocabulary.

    Source: label smoothing is Szegedy et al. 2016, arXiv:1512.00567, section 7.
    """
    vocab_size = kernel.shape[1]
    implementation = _resolved(implementation, vocab_size, hidden.dtype)
    config = _config(implementation, kernel, softcap, label_smoothing, token_chunk, vocab_chunk)
    # Hidden states [B, T, D] -> [B·T, D], arrays over tokens [B, T] -> [B·T]
    hidden = merge_rows(hidden, targets.ndim)
    hidden, kernel = as_product(hidden, kernel)
    per_token = tuple(merge_rows(x, targets.ndim) for x in per_token)
    targets = merge_rows(targets, targets.ndim)

    if implementation == "fused":
        return fused.summed_loss(token_loss, hidden, kernel, targets, per_token, config)
    if implementation == "reference":
        losses = reference.token_losses(hidden, kernel, targets, softcap, label_smoothing)
    else:
        losses = chunked.token_losses(hidden, kernel, targets, config)
    return _summed(token_loss, losses, per_token)


def _summed(
    token_loss: TokenLoss,
    losses: tuple[Float[Array, "tokens"], Float[Array, "tokens"]],
    per_token: tuple[Float[Array, "tokens"], ...],
) -> tuple[Float[Array, ""], Any]:
    """Returns `token_loss` of (nll, log_z), which alone have a gradient."""
    constants = [jax.lax.stop_gradient(x) for x in per_token]
    total, auxiliary = token_loss(*losses, *constants)
    return total, jax.lax.stop_gradient(auxiliary)


def _resolved(implementation: Implementation, vocab_size: int, dtype: Any) -> Implementation:
    """Returns the implementation to call.

    Off the CPU `auto` is `chunked`: `fused` takes few tokens at a time, and would spend most of its
    time on reading the kernel.
    """
    shard_size = vocab_shard_size(vocab_size)
    sharded = shard_size < vocab_size
    if implementation == "fused" and sharded:
        raise UserError(
            "implementation", "fused", "needs the whole vocabulary on each device: take 'chunked'."
        )
    if implementation != "auto":
        return implementation
    if platform() != "cpu" or sharded:
        return "chunked"
    fast = fused.is_fast(vocab_size, dtype)
    return "fused" if fast else "chunked"


def _config(
    implementation: Implementation,
    kernel: Weight,
    softcap: float | None,
    label_smoothing: float,
    token_chunk: int | None,
    vocab_chunk: int | None,
) -> CrossEntropyConfig:
    """Returns the static arguments, with chunk sizes chosen where they are None."""
    vocab_size = kernel.shape[1]
    if vocab_chunk is None:
        shard_size = vocab_shard_size(vocab_size)
        vocab_chunk = default_vocab_chunk(shard_size)
    if token_chunk is None and implementation == "fused":
        token_chunk = fused.default_fused_chunk(vocab_size)
    elif token_chunk is None:
        token_chunk = default_token_chunk(vocab_chunk)
    if min(token_chunk, vocab_chunk) < 1:
        raise UserError(
            "token_chunk", token_chunk, f"and vocab_chunk = {vocab_chunk} must be at least 1."
        )
    if not 0 <= label_smoothing < 1:
        raise UserError("label_smoothing", label_smoothing, "must lie in [0, 1).")
    dtype = gradient_dtype(kernel)
    return CrossEntropyConfig(softcap, label_smoothing, token_chunk, vocab_chunk, dtype)

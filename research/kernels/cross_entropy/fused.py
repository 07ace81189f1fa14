"""Cross-entropy that computes its gradient in the forward pass, so that logits are computed once.

The loss is one number, `token_loss(nll, log_z, *per_token)[0]`, so its gradient is known before the
backward pass up to one factor, the cotangent of that number. The forward pass takes a chunk of
tokens at a time and

1. computes all logits of the chunk, [chunk, V],
2. reduces them to nll and log_z of each token,
3. differentiates `token_loss` with respect to these, and
4. adds to the gradients of the hidden states and of the kernel.

The backward pass multiplies both gradients by the cotangent. That takes three matmuls (the logits
and the two gradients), where `chunked.py`, which recomputes the logits, takes four. A device must
have the whole vocabulary, because step 3 needs the log_z of complete rows of logits.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.cross_entropy import chunked
from research.kernels.cross_entropy.tiles import (
    CrossEntropyConfig,
    column_gradients,
    default_token_chunk,
    fold_tokens,
    fold_vocabulary,
    hidden_gradients,
    is_target,
    join_tokens,
    logit_gradients,
    make_logits,
    per_device,
    split_tokens,
    take_columns,
)
from research.parallel.gradient_sums import round_sum
from research.parallel.row_gradients import sum_over_tokens

# The most float32 logits that exist at once.
MAX_LOGITS = 2**25
# The most tokens of a chunk: more of them are no faster.
MAX_TOKEN_CHUNK = 2**11
# Smaller chunks are slower than `chunked` if the kernel must be rounded for each chunk.
MIN_FAST_CHUNK = 2**9

# (nll, log_z, *per_token), arrays over tokens, -> (a sum over tokens, auxiliary values).
TokenLoss = Callable[..., tuple[Float[Array, ""], Any]]


def default_fused_chunk(vocab_size: int) -> int:
    """Returns the tokens of a chunk, all of whose logits exist at once."""
    fitting = MAX_LOGITS // vocab_size
    tokens = min(MAX_TOKEN_CHUNK, fitting)
    return max(1, tokens)


def is_fast(vocab_size: int, dtype: Any) -> bool:
    """Returns whether this is faster than `chunked` on CPU, for hidden states in `dtype`."""
    if dtype == jnp.float32:
        return True
    tokens = default_fused_chunk(vocab_size)
    return tokens >= MIN_FAST_CHUNK


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def summed_loss(
    token_loss: TokenLoss,
    hidden: Float[Array, "tokens D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "tokens"],
    per_token: tuple[Float[Array, "tokens"], ...],
    config: CrossEntropyConfig,
) -> tuple[Float[Array, ""], Any]:
    """Returns `token_loss(nll, log_z, *per_token)`; only its first result has a gradient."""
    # This runs where no gradient is taken; `_forward` runs where one is.
    chunk = default_token_chunk(config.vocab_chunk)
    config = dataclasses.replace(config, token_chunk=chunk)
    nll, log_z = chunked.token_losses(hidden, kernel, targets, config)
    return token_loss(nll, log_z, *per_token)


def _forward(
    token_loss: TokenLoss,
    hidden: Array,
    kernel: Array,
    targets: Array,
    per_token: tuple[Array, ...],
    config: CrossEntropyConfig,
) -> tuple[tuple[Array, Any], tuple[Array, Array]]:
    """Returns the loss, and for the backward pass its gradients."""
    on_shard = functools.partial(_shard_losses_and_gradients, token_loss, config)
    (nll, log_z, dhidden), dkernel = per_device(
        on_shard, kernel, hidden, targets, *per_token, has_kernel_output=True
    )
    loss = token_loss(nll, log_z, *per_token)
    dkernel = round_sum(dkernel, kernel.dtype)
    return loss, (dhidden, dkernel)


def _backward(
    token_loss: TokenLoss,
    config: CrossEntropyConfig,
    gradients: tuple[Array, Array],
    g: tuple[Float[Array, ""], Any],
) -> tuple[Array, Array, None, None]:
    """Returns the gradients of the forward pass times the cotangent of the loss."""
    g_loss, _ = g
    dhidden, dkernel = (_scaled(x, g_loss) for x in gradients)
    return dhidden, dkernel, None, None


def _scaled(gradient: Float[Array, "..."], g_loss: Float[Array, ""]) -> Float[Array, "..."]:
    """Returns a gradient times the cotangent of the loss, multiplied in float32."""
    scaled = g_loss * gradient.astype(jnp.float32)
    return scaled.astype(gradient.dtype)


summed_loss.defvjp(_forward, _backward)


def _shard_losses_and_gradients(
    token_loss: TokenLoss,
    config: CrossEntropyConfig,
    batch_axes: tuple[str, ...],
    unused_tensor_axes: tuple[str, ...],
    kernel: Float[Array, "D V"],
    hidden: Float[Array, "tokens D"],
    targets: Int[Array, "tokens"],
    *per_token: Float[Array, "tokens"],
) -> tuple[tuple[Array, Array, Array], Float[Array, "part V"]]:
    """Returns ((nll, log_z, dhidden), dkernel) of a device's tokens; dkernel is of all tokens, and
    of the device's part of the width.
    """
    tokens = hidden.shape[0]
    # [tokens, D] -> [chunks, chunk, D]. `is_token` is 0 for the padding: 10 tokens in chunks of 4
    # give [[1 1 1 1] [1 1 1 1] [1 1 0 0]].
    is_token = jnp.ones(tokens)
    token_arrays = tuple(
        split_tokens(x, config.token_chunk) for x in (is_token, hidden, targets, *per_token)
    )
    hidden_chunks = token_arrays[1]
    chunks, chunk, _ = hidden_chunks.shape

    # One logits buffer is carried through the loop, so that every chunk reuses it.
    dkernel = jnp.zeros(kernel.shape, jnp.float32)
    logits = jnp.zeros((chunk, kernel.shape[1]), jnp.float32)
    nll = jnp.zeros((chunks, chunk))
    log_z = jnp.zeros((chunks, chunk))
    dhidden = jnp.zeros_like(hidden_chunks)

    on_chunk = functools.partial(_chunk_losses_and_gradients, token_loss, config, kernel)
    buffers = (dkernel, logits)
    by_chunk = (nll, log_z, dhidden)
    buffers, by_chunk = fold_tokens(on_chunk, buffers, by_chunk, token_arrays, unroll_limit=1)
    dkernel, _ = buffers

    # [chunks, chunk, ...] -> [tokens, ...]
    by_token = tuple(join_tokens(x, tokens) for x in by_chunk)
    dkernel = sum_over_tokens(dkernel, batch_axes, 0, config.kernel_gradient_dtype)
    return by_token, dkernel


def _chunk_losses_and_gradients(
    token_loss: TokenLoss,
    config: CrossEntropyConfig,
    kernel: Float[Array, "D V"],
    buffers: tuple[Float[Array, "D V"], Float[Array, "chunk V"]],
    unused_by_chunk: tuple[Array, ...],
    is_token: Float[Array, "chunk"],
    hidden: Float[Array, "chunk D"],
    targets: Int[Array, "chunk"],
    *per_token: Float[Array, "chunk"],
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array]]:
    """Returns ((dkernel, logits), (nll, log_z, dhidden)): steps 1 to 4 for one chunk of tokens.

    Args:
      token_loss, config, kernel: of the call.
      buffers: dkernel, which the chunk adds to, and an array for its logits.
      is_token: 0 where the chunk is padded.
      hidden, targets, *per_token: of the chunk.
    """
    vocab_size = kernel.shape[1]
    dkernel, logits = buffers
    logits = _write_logits(config, kernel, hidden, logits)
    nll, log_z = _losses(config, logits, targets)

    def summed(nll: Array, log_z: Array) -> Array:
        loss, _ = token_loss(nll, log_z, *per_token)
        return loss

    # d loss / d nll and d loss / d log_z of each token; padding has none.
    gradient_of_loss = jax.grad(summed, argnums=(0, 1))
    g_nll, g_log_z = gradient_of_loss(nll, log_z)
    is_real = is_token > 0
    g_nll = jnp.where(is_real, g_nll, 0.0)
    g_log_z = jnp.where(is_real, g_log_z, 0.0)

    def add_columns(gradients: tuple[Array, Array], start: Any, size: int) -> tuple[Array, Array]:
        dkernel, dhidden = gradients
        # Logits [chunk, V] -> [chunk, columns]
        logits_part = jax.lax.dynamic_slice_in_dim(logits, start, size, axis=1)
        one_hot = is_target(targets, start, size)
        dlogits = logit_gradients(
            config, vocab_size, logits_part, one_hot, log_z, g_nll, g_log_z, hidden.dtype
        )
        kernel_part = take_columns(kernel, start, size, hidden.dtype)
        dhidden += hidden_gradients(dlogits, kernel_part)

        dkernel_part = column_gradients(hidden, dlogits)
        dkernel_part += jax.lax.dynamic_slice_in_dim(dkernel, start, size, axis=1)
        dkernel = jax.lax.dynamic_update_slice_in_dim(dkernel, dkernel_part, start, axis=1)
        return dkernel, dhidden

    dhidden = jnp.zeros(hidden.shape, jnp.float32)
    gradients = (dkernel, dhidden)
    dkernel, dhidden = fold_vocabulary(add_columns, gradients, vocab_size, config.vocab_chunk)
    dhidden = dhidden.astype(hidden.dtype)
    return (dkernel, logits), (nll, log_z, dhidden)


def _write_logits(
    config: CrossEntropyConfig,
    kernel: Float[Array, "D V"],
    hidden: Float[Array, "chunk D"],
    logits: Float[Array, "chunk V"],
) -> Float[Array, "chunk V"]:
    """Returns all logits of a chunk of tokens, written into the array `logits`."""

    def write_columns(logits: Array, start: Any, size: int) -> Array:
        kernel_part = take_columns(kernel, start, size, hidden.dtype)
        logits_part = make_logits(hidden, kernel_part, config.softcap)
        return jax.lax.dynamic_update_slice_in_dim(logits, logits_part, start, axis=1)

    vocab_size = kernel.shape[1]
    return fold_vocabulary(write_columns, logits, vocab_size, config.vocab_chunk)


def _losses(
    config: CrossEntropyConfig, logits: Float[Array, "chunk V"], targets: Int[Array, "chunk"]
) -> tuple[Float[Array, "chunk"], Float[Array, "chunk"]]:
    """Returns nll and log_z of each token of a chunk."""
    log_z = jax.nn.logsumexp(logits, axis=-1)

    # [chunk, V] -> [chunk, 1] -> [chunk]
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)
    target_logit = target_logits[:, 0]
    nll = log_z - (1 - config.label_smoothing) * target_logit
    if config.label_smoothing:
        mean_logit = logits.mean(axis=-1)
        nll -= config.label_smoothing * mean_logit
    return nll, log_z

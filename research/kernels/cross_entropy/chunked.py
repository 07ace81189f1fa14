"""Cross-entropy by tiles of tokens and vocabulary: logits are computed twice and never kept.

The forward pass is an online softmax over chunks of the vocabulary. The backward pass recomputes
the logits, because their gradient needs the cotangent of each token, which is known only then.

Under a mesh each device has its shard of the tokens and its columns of the kernel, which never
leave it. Devices reduce a few numbers per token in the forward pass, and in the backward pass the
gradient of the hidden states, and that of the kernel after each tile of the vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.kernels.cross_entropy.tiles import (
    CrossEntropyConfig,
    column_gradients,
    fold_tokens,
    fold_vocabulary,
    hidden_gradients,
    is_target,
    join_tokens,
    local_targets,
    logit_gradients,
    make_logits,
    max_unrolled,
    per_device,
    split_tokens,
    take_columns,
)
from research.parallel.gradient_sums import round_sum
from research.parallel.row_gradients import local_width, sum_over_tokens


class OnlineSoftmax(NamedTuple):
    """What is known of each token after some columns of the kernel.

    Attributes:
      max_logit: the largest logit.
      denominator: Σ exp(z - max_logit).
      label_logit: Σ label · z, with smoothed labels.
    """

    max_logit: Float[Array, "*chunks chunk"]
    denominator: Float[Array, "*chunks chunk"]
    label_logit: Float[Array, "*chunks chunk"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def token_losses(
    hidden: Float[Array, "tokens D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "tokens"],
    config: CrossEntropyConfig,
) -> tuple[Float[Array, "tokens"], Float[Array, "tokens"]]:
    """Returns nll and log_z of each token; the gradient of `kernel` is summed in float32."""
    vocab_size = kernel.shape[1]
    on_shard = functools.partial(_shard_losses, config, vocab_size)
    return per_device(on_shard, kernel, hidden, targets, has_kernel_output=False)


def _shard_losses(
    config: CrossEntropyConfig,
    vocab_size: int,
    unused_batch_axes: tuple[str, ...],
    tensor_axes: tuple[str, ...],
    kernel: Float[Array, "D columns"],
    hidden: Float[Array, "tokens D"],
    targets: Int[Array, "tokens"],
) -> tuple[Float[Array, "tokens"], Float[Array, "tokens"]]:
    """Returns nll and log_z of a device's tokens, reduced over the shards of the vocabulary."""
    tokens = hidden.shape[0]
    num_columns = kernel.shape[1]
    targets = local_targets(targets, tensor_axes, num_columns)
    # [tokens, D] -> [chunks, chunk, D]
    token_arrays = tuple(split_tokens(x, config.token_chunk) for x in (hidden, targets))

    def add_columns(softmax: OnlineSoftmax, start: Any, size: int) -> OnlineSoftmax:
        kernel_part = take_columns(kernel, start, size, hidden.dtype)
        add_tile = functools.partial(_add_tile, config, vocab_size, kernel_part, start)
        unroll_limit = max_unrolled(num_columns, config.vocab_chunk)
        _, softmax = fold_tokens(add_tile, None, softmax, token_arrays, unroll_limit)
        return softmax

    _, target_chunks = token_arrays
    zeros = jnp.zeros(target_chunks.shape)
    lowest = jnp.full_like(zeros, -jnp.inf)  # the first tile sets the maximum
    softmax = OnlineSoftmax(lowest, zeros, zeros)
    softmax = fold_vocabulary(add_columns, softmax, num_columns, config.vocab_chunk)

    # Sums of each token: [chunks, chunk] -> [tokens]
    max_logit, denominator, label_logit = (join_tokens(x, tokens) for x in softmax)

    # The denominator of each shard is relative to the shard's own maximum.
    if tensor_axes:
        local_max = max_logit
        max_logit = jax.lax.pmax(max_logit, tensor_axes)
        rescale = jnp.exp(local_max - max_logit)
        denominator = denominator * rescale
        sums = (denominator, label_logit)
        denominator, label_logit = jax.lax.psum(sums, tensor_axes)

    log_z = max_logit + jnp.log(denominator)
    nll = log_z - label_logit
    return nll, log_z


def _add_tile(
    config: CrossEntropyConfig,
    vocab_size: int,
    kernel_part: Float[Array, "D columns"],
    start: Any,
    unused_total: None,
    softmax: OnlineSoftmax,
    hidden: Float[Array, "chunk D"],
    targets: Int[Array, "chunk"],
) -> tuple[None, OnlineSoftmax]:
    """Adds columns of the vocabulary, the first of them `start`, to the softmax of some tokens."""
    logits = make_logits(hidden, kernel_part, config.softcap)

    # Σ exp(z - new) = exp(old - new) · Σ exp(z - old): the old denominator, rescaled to the new
    # max.
    tile_max = logits.max(axis=-1)
    max_logit = jnp.maximum(softmax.max_logit, tile_max)
    rescale = jnp.exp(softmax.max_logit - max_logit)
    rescaled = softmax.denominator * rescale
    shifted = logits - max_logit[:, None]
    weights = jnp.exp(shifted)
    tile_sum = weights.sum(axis=-1)
    denominator = rescaled + tile_sum

    # Targets in other tiles have no column here: their rows of `one_hot` are zeros.
    size = kernel_part.shape[1]
    one_hot = is_target(targets, start, size)
    target_logits = jnp.where(one_hot, logits, 0.0)
    target_logit = target_logits.sum(axis=-1)
    target_weight = 1 - config.label_smoothing
    label_logit = softmax.label_logit + target_weight * target_logit
    if config.label_smoothing:
        uniform = config.label_smoothing / vocab_size
        sum_of_logits = logits.sum(axis=-1)
        label_logit += uniform * sum_of_logits

    return None, OnlineSoftmax(max_logit, denominator, label_logit)


def _forward(
    hidden: Array, kernel: Array, targets: Array, config: CrossEntropyConfig
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array, Array]]:
    nll, log_z = token_losses(hidden, kernel, targets, config)
    saved = (hidden, kernel, targets, log_z)
    return (nll, log_z), saved


def _backward(
    config: CrossEntropyConfig, saved: tuple[Array, ...], g: tuple[Array, Array]
) -> tuple[Array, Array, None]:
    hidden, kernel, targets, log_z = saved
    vocab_size = kernel.shape[1]
    on_shard = functools.partial(_shard_gradients, config, vocab_size)
    g_nll, g_log_z = g
    dhidden, dkernel = per_device(
        on_shard, kernel, hidden, targets, log_z, g_nll, g_log_z, has_kernel_output=True
    )
    dkernel = round_sum(dkernel, kernel.dtype)
    return dhidden, dkernel, None


def _shard_gradients(
    config: CrossEntropyConfig,
    vocab_size: int,
    batch_axes: tuple[str, ...],
    tensor_axes: tuple[str, ...],
    kernel: Float[Array, "D columns"],
    hidden: Float[Array, "tokens D"],
    targets: Int[Array, "tokens"],
    log_z: Float[Array, "tokens"],
    g_nll: Float[Array, "tokens"],
    g_log_z: Float[Array, "tokens"],
) -> tuple[Float[Array, "tokens D"], Float[Array, "part columns"]]:
    """Returns the gradients of a device's hidden states and of its part of the kernel."""
    tokens = hidden.shape[0]
    num_columns = kernel.shape[1]
    targets = local_targets(targets, tensor_axes, num_columns)
    # [tokens, D] -> [chunks, chunk, D]
    arrays = (hidden, targets, log_z, g_nll, g_log_z)
    token_arrays = tuple(split_tokens(x, config.token_chunk) for x in arrays)

    # What is summed over devices is not rounded before that.
    own_dtype = jnp.float32 if batch_axes else kernel.dtype

    def add_columns(gradients: tuple[Array, Array], start: Any, size: int) -> tuple[Array, Array]:
        dkernel, dhidden = gradients
        kernel_part = take_columns(kernel, start, size, hidden.dtype)
        add_tile = functools.partial(_add_tile_gradients, config, vocab_size, kernel_part, start)
        zeros = jnp.zeros(kernel_part.shape, jnp.float32)
        unroll_limit = max_unrolled(num_columns, config.vocab_chunk)
        dkernel_part, dhidden = fold_tokens(add_tile, zeros, dhidden, token_arrays, unroll_limit)

        # Devices sum a tile at a time, so that none has a gradient of the whole width:
        # [D, columns of the tile] -> [part, columns of the tile], written into [part, columns]
        dkernel_part = dkernel_part.astype(own_dtype)
        dkernel_part = sum_over_tokens(dkernel_part, batch_axes, 0, config.kernel_gradient_dtype)
        dkernel = jax.lax.dynamic_update_slice_in_dim(dkernel, dkernel_part, start, axis=1)
        return dkernel, dhidden

    width = local_width(batch_axes, kernel.shape[0])
    sum_dtype = config.kernel_gradient_dtype if batch_axes else own_dtype
    dkernel = jnp.zeros((width, num_columns), sum_dtype)
    hidden_chunks = token_arrays[0]
    dhidden = jnp.zeros(hidden_chunks.shape, jnp.float32)
    gradients = (dkernel, dhidden)
    dkernel, dhidden = fold_vocabulary(add_columns, gradients, num_columns, config.vocab_chunk)

    dhidden = join_tokens(dhidden, tokens)
    if tensor_axes:
        dhidden = jax.lax.psum(dhidden, tensor_axes)
    dhidden = dhidden.astype(hidden.dtype)
    return dhidden, dkernel


def _add_tile_gradients(
    config: CrossEntropyConfig,
    vocab_size: int,
    kernel_part: Float[Array, "D columns"],
    start: Any,
    dkernel_part: Float[Array, "D columns"],
    dhidden: Float[Array, "chunk D"],
    hidden: Float[Array, "chunk D"],
    targets: Int[Array, "chunk"],
    log_z: Float[Array, "chunk"],
    g_nll: Float[Array, "chunk"],
    g_log_z: Float[Array, "chunk"],
) -> tuple[Float[Array, "D columns"], Float[Array, "chunk D"]]:
    """Adds a tile to the gradients of its part of the kernel and of its hidden states."""
    logits = make_logits(hidden, kernel_part, config.softcap)
    size = kernel_part.shape[1]
    one_hot = is_target(targets, start, size)
    dlogits = logit_gradients(
        config, vocab_size, logits, one_hot, log_z, g_nll, g_log_z, hidden.dtype
    )
    dhidden += hidden_gradients(dlogits, kernel_part)
    dkernel_part += column_gradients(hidden, dlogits)
    return dkernel_part, dhidden


token_losses.defvjp(_forward, _backward)

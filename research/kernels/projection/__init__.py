"""The matmul of an activation with a weight, in the form that is fastest on each backend."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.projection import cpu, reference
from research.kernels.weights import Weight, WeightNode
from research.parallel.shard_map import shards_tokens
from research.parallel.target import platform

__all__ = ["Implementation", "multiply_table", "project"]

Implementation = Literal["auto", "reference", "cpu"]

# Up to so many tokens a product reads its weights at the rate of memory.
FEW_TOKENS = 16


def project(
    x: Float[Array, "..."],
    kernel: Weight,
    bias: Float[Array, "..."] | None = None,
    *,
    axes: int = 1,
    implementation: Implementation = "auto",
    gradient_dtype: str = "float32",
) -> Float[Array, "..."]:
    """Returns x W + b over the last `axes` axes of `x` and the first `axes` axes of `kernel`.

    Args:
      x: activations, `[..., D]`, or `[..., N, H]` with `axes` = 2.
      kernel: weights, `[D, F...]`, or `[N, H, D]` with `axes` = 2, an array or a `WeightNode`.
        They are rounded to the type of `x`; where they are float32, so is their gradient.
      bias: `[F...]`, or None.
      axes: how many axes are contracted, at least 1.
      implementation: `reference` contracts in place; `cpu` makes one matrix product of it, whose
        backward pass is faster there, and twice as fast in bfloat16; `auto` picks by backend.
      gradient_dtype: of the product that is the gradient of `kernel`, whose sum over the tokens of
        all devices is taken in it.

    Returns:
      `[..., F...]` in the type of `x`.
    """
    batch = x.shape[:-axes]
    inputs = kernel.shape[:axes]
    outputs = kernel.shape[axes:]
    assert x.shape == (*batch, *inputs), (x.shape, kernel.shape, axes)
    if isinstance(kernel, WeightNode):
        y = kernel.project(x, axes, implementation)
        if bias is None:
            return y
        # [F] -> [1, 1, F]
        bias = bias.astype(y.dtype)
        return y + jax.lax.broadcast_to_rank(bias, y.ndim)
    if implementation == "auto":
        # A mesh that shards both rows and their tokens cannot merge them without a gather.
        is_merged = platform() == "cpu" and not shards_tokens(x.shape)
        implementation = "cpu" if is_merged else "reference"
    if implementation == "reference":
        return reference.affine(x, kernel, bias, axes, gradient_dtype)

    # [B, T, N, H] [N, H, D] -> [B·T, N·H] [N·H, D] -> [B·T, D] -> [B, T, D]
    width = math.prod(inputs)
    flat_bias = None if bias is None else bias.reshape(-1)
    flat_x = x.reshape(-1, width)
    flat_kernel = kernel.reshape(width, -1)
    y = cpu.affine(flat_x, flat_kernel, flat_bias, gradient_dtype)
    return y.reshape(*batch, *outputs)


def multiply_table(
    x: Float[Array, "*batch D"],
    table: Float[Array, "V D"],
    implementation: Implementation = "auto",
) -> Float[Array, "*batch V"]:
    """Returns x Eᵀ, the logits of tied embeddings, in float32.

    Args:
      x: hidden states.
      table: embeddings E, in the type of `x`.
      implementation: `reference` contracts in place; `cpu` reads the table once in the order of
        memory, for few tokens; `auto` picks by backend and number of tokens.
    """
    *batch, width = x.shape
    is_few = math.prod(batch) <= FEW_TOKENS
    if implementation == "auto":
        implementation = "cpu" if platform() == "cpu" and is_few else "reference"
    if implementation == "reference":
        return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)

    flat_x = x.reshape(-1, width)
    logits = cpu.multiply_table(flat_x, table)
    return logits.reshape(*batch, -1)

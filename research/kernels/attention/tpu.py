"""Attention for TPU: Pallas kernels over the tiles of scores that the mask leaves."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.passes import ForwardResult
from research.kernels.attention.terms import ScoreTerms
from research.kernels.attention.tpu_backward import BackwardInputs, backward
from research.kernels.attention.tpu_bias import bias_gradient
from research.kernels.attention.tpu_forward import forward
from research.kernels.attention.tpu_plan import BlockSizes
from research.kernels.attention.tpu_tile import HIDDEN, LANES, LOG2E
from research.parallel.target import chip, platform

MAX_WIDTH = 256
# Queries or keys of a tile of scores: the first that holds all of a short sequence, or the last.
TILE_SIZES = (128, 256, 512)
# Bytes of one resident operand: what a head's queries or keys may take of VMEM, which holds several
# such operands.
RESIDENT_BYTES = {"TPU v4": 2**19}
DEFAULT_RESIDENT_BYTES = 2**22
# Chips whose matrix units are 256 wide: see `tpu_forward_transposed`.
WIDE_MATRIX_UNITS = ("TPU v6 lite", "TPU7x")
# A block of the bias has as many tokens as are resident on one side, and a tile's on the other.
RESIDENT_WITH_BIAS = 2048


def unsupported_reason(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], mask: AttentionMask, terms: ScoreTerms
) -> str | None:
    """Returns the rule that a call breaks, with the nearest value that it allows."""
    if platform() != "tpu":
        return f"{platform()}: it needs a TPU"
    if q.dtype.name not in ("float32", "bfloat16"):
        return f"{q.dtype.name}: it takes bfloat16 or float32"
    if q.shape[-1] > MAX_WIDTH:
        return f"head_dim = {q.shape[-1]}: it takes at most {MAX_WIDTH}"
    if terms.scale <= 0:
        return f"scale = {terms.scale}: it must be above 0"
    return None


def choose_blocks(
    width: int, itemsize: int, bias: bool, queries: int, keys: int
) -> tuple[BlockSizes, BlockSizes]:
    """Returns the block sizes of the forward and of the backward pass, for the chip that is
    compiled for.

    Args:
      width: head width H.
      itemsize: bytes of an element of q.
      bias: whether there is one.
      queries, keys: T and S.
    """
    # 4 MiB of heads of 128 in bfloat16 are 16,384 tokens; narrower heads take as many lanes.
    token_bytes = max(width, LANES) * itemsize
    resident_bytes = RESIDENT_BYTES.get(chip(), DEFAULT_RESIDENT_BYTES)
    resident = resident_bytes // token_bytes
    if bias:
        resident = min(resident, RESIDENT_WITH_BIAS)

    tile_queries = _tile_size(queries)
    tile_keys = _tile_size(keys)
    backward_blocks = BlockSizes(
        queries=tile_queries, keys=tile_keys, resident=max(tile_queries, tile_keys, resident)
    )
    if chip() not in WIDE_MATRIX_UNITS:
        return backward_blocks, backward_blocks

    # Queries are the columns of a transposed tile: twice as many, where the sequence has them.
    forward_queries = tile_queries
    if queries > tile_queries:
        forward_queries = 2 * tile_queries
    forward_blocks = dataclasses.replace(backward_blocks, queries=forward_queries, transposed=True)
    return forward_blocks, backward_blocks


def _tile_size(length: int) -> int:
    # 300 tokens -> 512, 100 -> 128, 4,096 -> 512
    fitting = [size for size in TILE_SIZES if size >= length]
    return fitting[0] if fitting else TILE_SIZES[-1]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> Float[Array, "B T N H"]:
    """Attention one tile at a time; see the API of the package for the equation."""
    return tiled_attention(q, k, v, mask, terms, _blocks_of(q, k, terms), False)


def _blocks_of(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], terms: ScoreTerms
) -> tuple[BlockSizes, BlockSizes]:
    """Returns the block sizes of a call."""
    _, queries, _, width = q.shape
    keys = k.shape[1]
    has_bias = terms.bias is not None
    return choose_blocks(width, q.dtype.itemsize, has_bias, queries, keys)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def tiled_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
    blocks: tuple[BlockSizes, BlockSizes],
    interpret: Any,
) -> Float[Array, "B T N H"]:
    """Attention in tiles of given sizes.

    Args:
      q, k, v, mask, terms: as of the API.
      blocks: block sizes of the forward and of the backward pass.
      interpret: what `pallas_call` takes by that name; False compiles.
    """
    out, _ = _forward(q, k, v, mask, terms, blocks, interpret)
    return out


def _swap_heads_and_tokens(x: Float[Array, "B first second H"]) -> Float[Array, "B second first H"]:
    return jnp.swapaxes(x, 1, 2)


def _forward(
    q: Array,
    k: Array,
    v: Array,
    mask: AttentionMask,
    terms: ScoreTerms,
    blocks: tuple[BlockSizes, BlockSizes],
    interpret: Any,
) -> tuple[Array, tuple]:
    # [B, T, N, H] -> [B, N, T, H]
    q = _swap_heads_and_tokens(q)
    k = _swap_heads_and_tokens(k)
    v = _swap_heads_and_tokens(v)
    forward_blocks, _ = blocks
    out, lse = forward(q, k, v, mask, terms, forward_blocks, interpret)
    residuals = (q, k, v, mask, terms, out, lse)
    return _swap_heads_and_tokens(out), residuals


def _backward(
    blocks: tuple[BlockSizes, BlockSizes],
    interpret: Any,
    residuals: tuple,
    g: Float[Array, "B T N H"],
) -> tuple:
    q, k, v, mask, terms, out, lse = residuals
    g = _swap_heads_and_tokens(g)

    # [B, N, T, H] -> [B, N, T] -> [B, N, 1, T]
    products = g.astype(jnp.float32) * out.astype(jnp.float32)
    delta = jnp.sum(products, axis=-1)[:, :, None]
    inputs = BackwardInputs(q, k, v, g.astype(v.dtype), lse, delta)

    _, backward_blocks = blocks
    gradients = backward(inputs, mask, terms, backward_blocks, interpret)
    dq, dk, dv = map(_swap_heads_and_tokens, gradients)

    # A custom gradient of `terms` is a value of the same class.
    dterms: dict[str, Array] = {}
    if terms.bias is not None:
        dterms["bias"] = bias_gradient(inputs, mask, terms, backward_blocks, interpret)
    if terms.alibi is not None:
        dterms["alibi"] = jnp.zeros_like(terms.alibi)
    if terms.sinks is not None:
        dterms["sinks"] = _sink_gradient(terms.sinks, lse, delta)
    return dq, dk, dv, None, dataclasses.replace(terms, **dterms)


def _sink_gradient(
    sinks: Float[Array, "N"], lse: Float[Array, "B N 1 T"], delta: Float[Array, "B N 1 T"]
) -> Float[Array, "N"]:
    """Returns −Σ weight · delta: a sink has a weight, and the value 0."""
    # [N] -> [1, N, 1, 1], in units of log 2
    logits = sinks.astype(jnp.float32)[None, :, None, None] * LOG2E
    weights = jnp.exp2(logits - lse)
    gradient = -jnp.sum(weights * delta, axis=(0, 2, 3))
    return gradient.astype(sinks.dtype)


tiled_attention.defvjp(_forward, _backward)


def forward_pass(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> ForwardResult:
    """Implements `passes.Passes.forward_pass`."""
    out, residuals = _forward(q, k, v, mask, terms, _blocks_of(q, k, terms), False)
    *_, lse = residuals
    # [B, N, 1, T] to base 2 -> [B, T, N]
    lse = lse[:, :, 0]
    lse = jnp.swapaxes(lse, 1, 2) / LOG2E
    return ForwardResult(out, lse)


def backward_pass(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
    result: ForwardResult,
    g: Float[Array, "B T N H"],
) -> tuple[Array, Array, Array, ScoreTerms]:
    """Implements `passes.Passes.backward_pass`."""
    # [B, T, N] -> [B, N, 1, T]
    lse = jnp.swapaxes(result.lse, 1, 2)
    lse = lse[:, :, None] * LOG2E
    lse = jnp.minimum(lse, -HIDDEN)
    q_first, k_first, v_first, out = map(_swap_heads_and_tokens, (q, k, v, result.out))
    residuals = (q_first, k_first, v_first, mask, terms, out, lse)
    dq, dk, dv, _, dterms = _backward(_blocks_of(q, k, terms), False, residuals, g)
    return dq, dk, dv, dterms

"""Attention for TPU: Pallas kernels over the tiles of scores that the mask leaves."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.kernels.attention.tpu_backward import backward
from research.kernels.attention.tpu_bias import bias_gradient
from research.kernels.attention.tpu_forward import forward
from research.kernels.attention.tpu_plan import Blocks
from research.kernels.attention.tpu_tile import LOG2E
from research.parallel.target import chip, platform

MAX_WIDTH = 256
# Rows and columns of a tile of scores: the first that holds all of a short sequence, or the last.
TILES = (128, 256, 512)
# Bytes of one resident operand: what a head's queries or keys may take of a core's fast memory,
# several times over.
RESIDENT_BYTES = {"TPU v4": 2**19}
DEFAULT_RESIDENT_BYTES = 2**22
# Chips whose matrix units are 256 wide: see `tpu_forward_down`.
WIDE_UNITS = ("TPU v6 lite", "TPU7x")
# A block of the bias is as long as what is resident, and as wide as a tile.
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
) -> tuple[Blocks, Blocks]:
    """Returns the tile sizes of the forward and of the backward pass, for the chip that is compiled
    for.

    Args:
      width: head width H.
      itemsize: bytes of an element of q.
      bias: whether there is one.
      queries, keys: T and S.
    """
    resident = RESIDENT_BYTES.get(chip(), DEFAULT_RESIDENT_BYTES) // (max(width, 128) * itemsize)
    resident = min(resident, RESIDENT_WITH_BIAS) if bias else resident
    backward = Blocks(
        *(next(size for size in TILES if size >= min(x, TILES[-1])) for x in (queries, keys))
    )
    backward = dataclasses.replace(
        backward, resident=max(backward.queries, backward.keys, resident)
    )
    if chip() not in WIDE_UNITS:
        return backward, backward
    tall = 2 * backward.queries if queries > backward.queries else backward.queries
    return dataclasses.replace(backward, queries=tall, down=True), backward


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> Float[Array, "B T N H"]:
    """Attention a tile at a time; see the API of the package for the equation."""
    blocks = choose_blocks(
        q.shape[-1], q.dtype.itemsize, terms.bias is not None, q.shape[1], k.shape[1]
    )
    return tiled_attention(q, k, v, mask, terms, blocks, False)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def tiled_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
    blocks: tuple[Blocks, Blocks],
    interpret: Any,
) -> Float[Array, "B T N H"]:
    """Attention in tiles of a given size.

    Args:
      q, k, v, mask, terms: as in the API.
      blocks: tile sizes of the forward and of the backward pass.
      interpret: what `pallas_call` takes by that name; False compiles.
    """
    return _forward(q, k, v, mask, terms, blocks, interpret)[0]


def _heads_first(x: Float[Array, "B L N H"]) -> Float[Array, "B N L H"]:
    return jnp.swapaxes(x, 1, 2)


def _forward(
    q: Array,
    k: Array,
    v: Array,
    mask: AttentionMask,
    terms: ScoreTerms,
    blocks: tuple[Blocks, Blocks],
    interpret: Any,
) -> tuple[Array, tuple]:
    q, k, v = map(_heads_first, (q, k, v))
    out, log_total = forward(q, k, v, mask, terms, blocks[0], interpret)
    return _heads_first(out), (q, k, v, mask, terms, out, log_total)


def _backward(
    blocks: tuple[Blocks, Blocks], interpret: Any, saved: tuple, g: Float[Array, "B T N H"]
) -> tuple:
    q, k, v, mask, terms, out, log_total = saved
    g = _heads_first(g)
    delta = jnp.sum(g.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)[:, :, None]
    arguments = (q, k, v, g.astype(v.dtype), log_total, delta, mask, terms, blocks[1], interpret)
    dq, dk, dv = map(_heads_first, backward(*arguments))
    shares: dict[str, Array] = {}
    if terms.bias is not None:
        shares["bias"] = bias_gradient(*arguments)
    if terms.alibi is not None:
        shares["alibi"] = jnp.zeros_like(terms.alibi)
    if terms.sinks is not None:
        weights = jnp.exp2(terms.sinks.astype(jnp.float32)[None, :, None, None] * LOG2E - log_total)
        shares["sinks"] = -jnp.sum(weights * delta, axis=(0, 2, 3)).astype(terms.sinks.dtype)
    return dq, dk, dv, None, dataclasses.replace(terms, **shares)


tiled_attention.defvjp(_forward, _backward)

"""What the GPU kernels of attention start from: a static plan, padded operands."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.kernels.rounding import round_up

# Rows of one warpgroup's matmul, and the two warpgroups that compute in a block.
ROWS = 64
WARPGROUPS = 2
TILE = ROWS * WARPGROUPS
# Elements of 16 bits in the widest swizzle of shared memory.
SWIZZLED = 64


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known when a kernel is traced.

    Attributes:
      queries, keys: T and S, before they are padded to whole tiles.
      group: query heads per key/value head.
      causal, window: of the mask.
      softcap, scale: of the terms.
      interpret: run on the CPU by JAX's interpreter of GPU kernels.
    """

    queries: int
    keys: int
    group: int
    causal: bool
    window: int | None
    softcap: float | None
    scale: float
    interpret: bool

    @property
    def padded_queries(self) -> int:
        """T in whole tiles."""
        return round_up(self.queries, TILE)

    @property
    def padded_keys(self) -> int:
        """S in whole tiles."""
        return round_up(self.keys, TILE)


def fill(x: Array, *sizes: int) -> Array:
    """Pads the trailing axes with zeros up to `sizes`, copying nothing where they are reached."""
    leading = x.ndim - len(sizes)
    missing = [size - length for size, length in zip(sizes, x.shape[leading:], strict=True)]
    if not any(missing):
        return x

    # [2, 200] to 256 tokens -> ((0, 0), (0, 56))
    widths = [(0, 0)] * leading
    widths += [(0, amount) for amount in missing]
    return jnp.pad(x, widths)


def pad_tokens(x: Float[Array, "B T N H"]) -> Float[Array, "B padded_T N padded_H"]:
    """Pads tokens to whole tiles, and the head width to whole swizzles."""
    _, length, heads, width = x.shape
    padded_length = round_up(length, TILE)
    padded_width = round_up(width, SWIZZLED)
    return fill(x, padded_length, heads, padded_width)


def extra_arrays(mask: AttentionMask, terms: ScoreTerms, plan: Plan) -> dict[str, Array]:
    """Returns the arrays of the mask and the terms that are there, by name.

    They are padded as the kernels read them: those of tokens and the bias to whole tiles.
    """
    tokens = {
        "q_segments": plan.padded_queries,
        "kv_segments": plan.padded_keys,
        "q_positions": plan.padded_queries,
        "kv_positions": plan.padded_keys,
    }
    # Padded tokens have the segment 0, which is hidden.
    arrays = {}
    for name, padded_length in tokens.items():
        x = getattr(mask, name)
        if x is not None:
            arrays[name] = fill(x.astype(jnp.int32), padded_length)

    # A prefix shows what causality or a window hides: without them it changes nothing.
    if mask.prefix is not None and (mask.causal or mask.window is not None):
        arrays["prefix"] = mask.prefix.astype(jnp.int32)

    if terms.sinks is not None:
        arrays["sinks"] = terms.sinks.astype(jnp.float32)
    if terms.alibi is not None:
        arrays["alibi"] = terms.alibi.astype(jnp.float32)
    if terms.bias is not None:
        _, _, queries, keys = terms.bias.shape
        # An axis of size 1 is broadcast: [1, N, 200, 1] -> [1, N, 256, 1]
        padded_queries = plan.padded_queries if queries > 1 else 1
        padded_keys = plan.padded_keys if keys > 1 else 1
        arrays["bias"] = fill(terms.bias, padded_queries, padded_keys)
    return arrays

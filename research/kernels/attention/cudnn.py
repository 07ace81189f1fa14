"""Attention through cuDNN, for the calls that it supports."""

import jax
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.kernels.rounding import round_up
from research.parallel.target import platform

# JAX's wrapper takes 256 from Hopper on, but asks the chip that is here, so that no other machine
# could plan for it.
MAX_WIDTH = 128


def unsupported_reason(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], mask: AttentionMask, terms: ScoreTerms
) -> str | None:
    """Returns the rule of cuDNN that a call breaks, with the nearest value that it allows.

    Nothing here knows whether a gradient will be taken, so the rules are those of training. Packed
    documents are unsupported too: cuDNN takes them as offsets and lengths, which say less than a
    segment per token.
    """
    described = ("prefix", "q_segments", "kv_segments", "q_positions", "kv_positions")
    unknown = [name for name in described if getattr(mask, name) is not None]
    unknown += [name for name in terms.given if name != "bias"]
    if unknown:
        return unknown[0]
    if mask.window is not None and not mask.causal:
        return f"window = {mask.window} without causal: it takes a window with causal = True"
    if q.dtype.name not in ("bfloat16", "float16"):
        return f"{q.dtype.name}: it takes bfloat16 or float16"
    width = q.shape[-1]
    if width > MAX_WIDTH or width % 8:
        # 30 -> 32, 300 -> 128
        nearest = min(MAX_WIDTH, round_up(width, 8))
        return f"head_dim = {width}: it takes multiples of 8 up to {MAX_WIDTH}, such as {nearest}"
    queries = q.shape[1]
    keys = k.shape[1]
    if mask.causal and queries != keys:
        # Which corner its diagonal starts from is not its contract.
        return (
            f"{queries} queries and {keys} keys with causal: it takes as many queries as keys, "
            f"such as {keys}"
        )
    if terms.bias is not None:
        reason = _unsupported_bias(q, k, terms.bias)
        if reason is not None:
            return reason
    if platform() != "gpu":
        return f"{platform()}: it needs a GPU"
    return None


def _unsupported_bias(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], bias: Float[Array, "#B #N #T #S"]
) -> str | None:
    """Returns the rule of cuDNN for the gradient of a bias that a bias breaks."""
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    if batch > 1:
        return f"bias at batch = {batch}: it gives its gradient at batch = 1"
    if bias.shape != (1, heads, queries, keys):
        return (
            f"bias of shape {bias.shape}: it takes {(1, heads, queries, keys)}, with nothing "
            "broadcast"
        )
    if bias.dtype != q.dtype:
        return f"bias in {bias.dtype.name}: it takes it in the queries' {q.dtype.name}"
    if queries % 2 or keys % 2:
        # 5 queries and 6 keys -> 6 and 6
        even = (round_up(queries, 2), round_up(keys, 2))
        return (
            f"bias of {queries} queries and {keys} keys: it takes even lengths, such as "
            f"{even[0]} and {even[1]}"
        )
    return None


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> Float[Array, "B T N H"]:
    """Full, causal and causal sliding-window attention with an optional bias, in bfloat16 or
    float16.
    """
    # A window of 3 is a query's own key and the two before it.
    window = None if mask.window is None else (mask.window - 1, 0)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        bias=terms.bias,
        scale=terms.scale,
        is_causal=mask.causal,
        local_window_size=window,
        implementation="cudnn",
    )

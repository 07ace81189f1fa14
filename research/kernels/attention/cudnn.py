"""Attention through cuDNN, for what it knows."""

import jax
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.kernels.target import platform


def refusal(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], mask: AttentionMask, terms: ScoreTerms
) -> str | None:
    """Returns the rule of cuDNN that a call breaks, with the nearest value that it allows."""
    described = ("prefix", "q_segments", "kv_segments", "q_positions", "kv_positions")
    unknown = [name for name in described if getattr(mask, name) is not None]
    unknown += [name for name in terms.given if name != "bias"]
    if mask.window is not None and not mask.causal:
        unknown.append("window without causal")
    if unknown:
        return f"{unknown[0]}, which it does not know"
    if q.dtype.name not in ("bfloat16", "float16"):
        return f"{q.dtype.name}: it takes bfloat16 or float16"
    width = q.shape[-1]
    if width > 128 or width % 8:
        return f"head_dim = {width}: it takes multiples of 8 up to 128, such as {min(128, -(-width // 8) * 8)}"
    if platform() != "gpu":
        return f"{platform()}: it needs a GPU"
    return None


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> Float[Array, "B T N H"]:
    """Full, causal and causal sliding-window attention with an optional bias, in bfloat16 or float16."""
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

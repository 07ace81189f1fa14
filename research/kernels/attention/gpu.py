"""Attention for Hopper GPUs: Pallas kernels for what cuDNN does not know, forward and backward.

The kernels take whole tiles: tokens and head widths that are not are padded with zeros here, and
padded keys hidden. Which blocks meet is found out beforehand from a few numbers a block; those that
the mask rules out are never visited. Memory is linear in length but for those lists, which take
four bytes a pair of blocks: a scores' array over 8,192.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention.gpu_backward import (
    STEP,
    bias_gradient,
    key_gradients,
    query_gradient,
)
from research.kernels.attention.gpu_forward import forward, key_block
from research.kernels.attention.gpu_plan import ROWS, TILE, Plan, block_kinds, extras, pad_tokens
from research.kernels.attention.gpu_tile import LOG2E
from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.parallel.target import not_hopper, platform

MAX_WIDTH = 256


def unsupported_reason(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], mask: AttentionMask, terms: ScoreTerms
) -> str | None:
    """Returns the rule that a call breaks, with the nearest value that it allows."""
    if q.dtype.name not in ("bfloat16", "float16"):
        return f"{q.dtype.name}: it takes bfloat16 or float16"
    if q.shape[-1] > MAX_WIDTH:
        return f"head_dim = {q.shape[-1]}: it takes 1 to {MAX_WIDTH}, such as {MAX_WIDTH}"
    return not_hopper()


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> Float[Array, "B T N H"]:
    """Attention a block at a time; see the API of the package for the equation.

    On another platform than a GPU it runs in JAX's interpreter of GPU kernels, for tests.
    """
    plan = Plan(
        queries=q.shape[1],
        keys=k.shape[1],
        group=q.shape[2] // k.shape[2],
        causal=mask.causal,
        window=mask.window,
        softcap=terms.softcap,
        scale=float(terms.scale),
        interpret=platform() != "gpu",
    )
    return _attention(q, k, v, mask, terms, plan)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q: Array, k: Array, v: Array, mask: AttentionMask, terms: ScoreTerms, plan: Plan
) -> Array:
    return _attention_fwd(q, k, v, mask, terms, plan)[0]


def _attention_fwd(
    q: Array, k: Array, v: Array, mask: AttentionMask, terms: ScoreTerms, plan: Plan
) -> tuple[Array, tuple]:
    q_pad, k_pad, v_pad = map(pad_tokens, (q, k, v))
    kinds = block_kinds(mask, plan, TILE, key_block(q_pad.shape[-1]))
    out, log_total = forward(plan, q_pad, k_pad, v_pad, extras(mask, terms, plan), kinds)
    out = out[:, : plan.queries, :, : q.shape[-1]]
    return out, (q, k, v, mask, terms, out, log_total)


def _attention_bwd(plan: Plan, saved: tuple, g: Float[Array, "B T N H"]) -> tuple:
    q, k, v, mask, terms, out, log_total = saved
    width = q.shape[-1]
    delta = jnp.einsum("BTNH,BTNH->BNT", g, out, preferred_element_type=jnp.float32)
    delta = jnp.pad(delta, ((0, 0), (0, 0), (0, plan.padded_queries - plan.queries)))
    operands = (*map(pad_tokens, (q, k, v, g.astype(q.dtype))), log_total, delta)
    given = extras(mask, terms, plan)

    dq = query_gradient(plan, operands, given, block_kinds(mask, plan, TILE, STEP))
    turned = given | ({"bias": jnp.swapaxes(given["bias"], 2, 3)} if "bias" in given else {})
    a_key = (
        ("dbias",)
        if terms.bias is not None and terms.bias.shape[2] == 1 < terms.bias.shape[3]
        else ()
    )
    # The sums of both do not fit in the registers of wide heads.
    launches = [("dk", "dv", *a_key)] if width <= 128 else [("dk", *a_key), ("dv",)]
    kinds = block_kinds(mask, plan, STEP, TILE)
    found: dict[str, Array] = {}
    for wanted in launches:
        found |= dict(
            zip(wanted, key_gradients(plan, operands, turned, kinds, wanted), strict=True)
        )
    dk, dv = (found[name][:, : plan.keys, :, :width] for name in ("dk", "dv"))
    shares = _sink_shares(terms, log_total, delta)
    dbias = _bias_gradient(plan, operands, given, mask, terms, found, shares)
    dsinks = (
        None if terms.sinks is None else -jnp.sum(shares, axis=(0, 2)).astype(terms.sinks.dtype)
    )
    dalibi = None if terms.alibi is None else jnp.zeros_like(terms.alibi)
    dterms = ScoreTerms(
        bias=dbias, alibi=dalibi, sinks=dsinks, softcap=terms.softcap, scale=terms.scale
    )
    return dq[:, : plan.queries, :, :width], dk, dv, None, dterms


_attention.defvjp(_attention_fwd, _attention_bwd)


def _sink_shares(
    terms: ScoreTerms, log_total: Float[Array, "B N T"], delta: Float[Array, "B N T"]
) -> Float[Array, "B N T"]:
    """Returns delta times the weight of the sink: minus the gradient of the sink, a query."""
    if terms.sinks is None:
        return jnp.zeros_like(delta)
    return delta * jnp.exp2(terms.sinks.astype(jnp.float32)[None, :, None] * LOG2E - log_total)


def _bias_gradient(
    plan: Plan,
    operands: tuple[Array, ...],
    given: dict[str, Array],
    mask: AttentionMask,
    terms: ScoreTerms,
    found: dict[str, Any],
    shares: Float[Array, "B N T"],
) -> Array | None:
    """Returns the gradient of the bias, summed over what shares it."""
    if terms.bias is None:
        return None
    batches, heads, queries, keys = terms.bias.shape
    if queries > 1 and keys > 1:
        kinds = block_kinds(mask, plan, TILE, ROWS)
        out = bias_gradient(plan, operands, given, kinds, (batches, heads))
    elif keys == 1:
        # Over all keys the gradients of a query's scores sum to delta (1 − Σ weights).
        out = shares[..., None]
    else:
        out = found["dbias"][:, :, None, :]
    out = out[:, :, : plan.queries, : plan.keys]
    summed = tuple(axis for axis in range(4) if terms.bias.shape[axis] == 1 and out.shape[axis] > 1)
    return jnp.sum(out, axis=summed, keepdims=True).astype(terms.bias.dtype)

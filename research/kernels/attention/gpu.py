"""Attention for Hopper GPUs: Pallas kernels for what cuDNN does not support, forward and backward.

The kernels take whole tiles. Tokens and head widths that are not are padded with zeros here, and
padded keys are hidden. Which pairs of a block of queries and a block of keys are visible is
computed beforehand, from a few numbers per block; hidden pairs are never visited. Memory is linear
in the length but for the lists of pairs, which take four bytes per pair of blocks: 1 / 8,192 of an
array of scores.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.kernels.attention.gpu_backward import STEP, Operands
from research.kernels.attention.gpu_bias_gradient import bias_gradient
from research.kernels.attention.gpu_forward import forward, keys_per_step
from research.kernels.attention.gpu_key_gradients import key_gradients
from research.kernels.attention.gpu_plan import ROWS, TILE, Plan, extra_arrays, pad_tokens
from research.kernels.attention.gpu_query_gradient import query_gradient
from research.kernels.attention.gpu_tile import LOG2E
from research.kernels.attention.gpu_visits import block_kinds
from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.passes import ForwardResult
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
    """Attention one block at a time; see the API of the package for the equation.

    On another platform than a GPU it runs in JAX's interpreter of GPU kernels, for tests.
    """
    return _attention(q, k, v, mask, terms, _plan_of(q, k, mask, terms))


def _plan_of(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], mask: AttentionMask, terms: ScoreTerms
) -> Plan:
    """Returns the static arguments of a call."""
    return Plan(
        queries=q.shape[1],
        keys=k.shape[1],
        group=q.shape[2] // k.shape[2],
        causal=mask.causal,
        window=mask.window,
        softcap=terms.softcap,
        scale=float(terms.scale),
        interpret=platform() != "gpu",
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q: Array, k: Array, v: Array, mask: AttentionMask, terms: ScoreTerms, plan: Plan
) -> Array:
    out, _ = _attention_fwd(q, k, v, mask, terms, plan)
    return out


def _attention_fwd(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
    plan: Plan,
) -> tuple[Float[Array, "B T N H"], tuple]:
    width = q.shape[-1]
    # 200 tokens, heads of 80 -> 256 tokens, heads of 128
    q_padded = pad_tokens(q)
    keys = keys_per_step(q_padded.shape[-1])
    out, lse = forward(
        plan,
        q_padded,
        pad_tokens(k),
        pad_tokens(v),
        extra_arrays(mask, terms, plan),
        block_kinds(mask, plan, block_q=TILE, block_kv=keys),
    )
    out = out[:, : plan.queries, :, :width]
    return out, (q, k, v, mask, terms, out, lse)


def _attention_bwd(
    plan: Plan, residuals: tuple, g: Float[Array, "B T N H"]
) -> tuple[Array, Array, Array, None, ScoreTerms]:
    q, k, v, mask, terms, out, lse = residuals
    width = q.shape[-1]
    operands = Operands(
        q=pad_tokens(q),
        k=pad_tokens(k),
        v=pad_tokens(v),
        g=pad_tokens(g.astype(q.dtype)),
        lse=lse,
        delta=_delta(plan, g, out),
    )
    extras = extra_arrays(mask, terms, plan)

    kinds = block_kinds(mask, plan, block_q=TILE, block_kv=STEP)
    dq = query_gradient(plan, operands, extras, kinds)
    by_key = _all_key_gradients(plan, operands, extras, mask, terms)

    sink_gradients = _sink_gradients(terms, operands)
    dsinks = None
    if terms.sinks is not None:
        # [B, N, T] -> [N]
        dsinks = jnp.sum(sink_gradients, axis=(0, 2))
        dsinks = -dsinks.astype(terms.sinks.dtype)
    dbias = None
    if terms.bias is not None:
        dbias = _bias_gradient(plan, operands, extras, mask, terms.bias, by_key, sink_gradients)
    dalibi = None
    if terms.alibi is not None:
        dalibi = jnp.zeros_like(terms.alibi)
    dterms = ScoreTerms(dbias, dalibi, dsinks, terms.softcap, terms.scale)

    dq = dq[:, : plan.queries, :, :width]
    dk = by_key["dk"][:, : plan.keys, :, :width]
    dv = by_key["dv"][:, : plan.keys, :, :width]
    return dq, dk, dv, None, dterms


_attention.defvjp(_attention_fwd, _attention_bwd)


def forward_pass(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> ForwardResult:
    """Implements `passes.Passes.forward_pass`."""
    plan = _plan_of(q, k, mask, terms)
    out, residuals = _attention_fwd(q, k, v, mask, terms, plan)
    *_, lse = residuals
    # [B, N, padded T] to base 2 -> [B, T, N]
    lse = jnp.swapaxes(lse[:, :, : plan.queries], 1, 2)
    return ForwardResult(out, lse / LOG2E)


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
    plan = _plan_of(q, k, mask, terms)
    lse = jnp.swapaxes(result.lse, 1, 2) * LOG2E
    # Padded queries have no weights.
    padding = plan.padded_queries - plan.queries
    lse = jnp.pad(lse, ((0, 0), (0, 0), (0, padding)), constant_values=jnp.inf)
    residuals = (q, k, v, mask, terms, result.out, lse)
    dq, dk, dv, _, dterms = _attention_bwd(plan, residuals, g)
    return dq, dk, dv, dterms


def _delta(
    plan: Plan, g: Float[Array, "B T N H"], out: Float[Array, "B T N H"]
) -> Float[Array, "B N padded_T"]:
    """Returns Σ_H g · out of each query, which is Σ_S of the weights times their gradients."""
    delta = jnp.einsum("BTNH,BTNH->BNT", g, out, preferred_element_type=jnp.float32)
    padding = plan.padded_queries - plan.queries
    return jnp.pad(delta, ((0, 0), (0, 0), (0, padding)))


def _all_key_gradients(
    plan: Plan, operands: Operands, extras: dict[str, Array], mask: AttentionMask, terms: ScoreTerms
) -> dict[str, Array]:
    """Returns `dk`, `dv` and, for a bias per key, `dbias`."""
    if terms.bias is not None:
        # The kernel's tiles are [S, T].
        transposed = jnp.swapaxes(extras["bias"], 2, 3)
        extras = {**extras, "bias": transposed}

    # Gradients that one kernel computes.
    launches = [("dk", "dv")]
    if operands.q.shape[-1] > 128:
        # The sums of both do not fit in the registers.
        launches = [("dk",), ("dv",)]
    if terms.bias is not None and _is_by_key(terms.bias):
        launches[0] += ("dbias",)

    kinds = block_kinds(mask, plan, block_q=STEP, block_kv=TILE)
    found = {}
    for wanted in launches:
        found |= key_gradients(plan, operands, extras, kinds, wanted)
    return found


def _is_by_key(bias: Float[Array, "#B #N #T #S"]) -> bool:
    """Returns whether a bias differs by key and not by query."""
    _, _, queries, keys = bias.shape
    return queries == 1 and keys > 1


def _sink_gradients(terms: ScoreTerms, operands: Operands) -> Float[Array, "B N padded_T"]:
    """Returns minus the gradient of the sink, per query: delta times the weight of the sink."""
    if terms.sinks is None:
        return jnp.zeros_like(operands.delta)
    # Scores and lse are to base 2.
    sinks = terms.sinks.astype(jnp.float32)[None, :, None] * LOG2E
    weights = jnp.exp2(sinks - operands.lse)
    return operands.delta * weights


def _bias_gradient(
    plan: Plan,
    operands: Operands,
    extras: dict[str, Array],
    mask: AttentionMask,
    bias: Float[Array, "#B #N #T #S"],
    by_key: dict[str, Array],
    sink_gradients: Float[Array, "B N padded_T"],
) -> Float[Array, "#B #N #T #S"]:
    """Returns the gradient of the bias, summed over what it is broadcast to."""
    batches, heads, queries, keys = bias.shape
    if queries > 1 and keys > 1:
        kinds = block_kinds(mask, plan, block_q=TILE, block_kv=ROWS)
        out = bias_gradient(plan, operands, extras, kinds, shared=(batches, heads))
    elif keys == 1:
        # Over all keys the gradients of a query's scores sum to delta (1 − Σ weights).
        out = sink_gradients[..., None]
    else:
        # [B, N, S] -> [B, N, 1, S]
        out = by_key["dbias"][:, :, None, :]
    out = out[:, :, : plan.queries, : plan.keys]

    # A bias [1, N, T, S] of [B, N, T, S]: summed over axis 0.
    summed = [axis for axis, size in enumerate(bias.shape) if size < out.shape[axis]]
    out = jnp.sum(out, axis=tuple(summed), keepdims=True)
    return out.astype(bias.dtype)

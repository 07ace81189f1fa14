"""Attention for CPU: tiles of queries against the keys that they can reach, with its own gradient.

Steps of a call:

1. `cpu_shards` cuts the batch and the heads into a few shards that run on threads of their own.
2. Each shard is laid out heads first, `[B, T, N, H] -> [BK, G, T, H]`: batched matmuls over `BK`
   that the matmul library takes as they are.
3. `cpu_tile` cuts the queries into tiles and finds the keys that each can reach; blocks of scores
   above the diagonal are never computed.
4. `cpu_forward` computes each tile's softmax and keeps its logsumexp and not the weights;
   `cpu_backward` recomputes the scores.

Memory is linear in the length: a tile has the same size however many there are. The few tiles of a
short sequence are unrolled, each with its own range of keys. Those of a long one are grouped into
bands; a band is a loop (`lax.scan`) whose tiles all take the keys that the band can reach.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.trees import node
from research.kernels.attention.cpu_backward import Saved, backward, zero_gradients
from research.kernels.attention.cpu_forward import forward
from research.kernels.attention.cpu_shards import Shard, ShardGrid, shard_grid
from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.passes import ForwardResult
from research.kernels.attention.terms import ScoreTerms


@node(static=("grid",))
@dataclasses.dataclass(frozen=True)
class _Residuals:
    """What the forward pass keeps for the backward pass.

    Attributes:
      shards: what the forward pass saved, one entry per shard.
      mask, terms: of the whole call.
      grid: how the call was cut.
    """

    shards: list[Saved]
    mask: AttentionMask
    terms: ScoreTerms
    grid: ShardGrid


def unsupported_reason(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], mask: AttentionMask, terms: ScoreTerms
) -> None:
    """Returns None: every call is supported."""


@jax.custom_vjp
def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> Float[Array, "B T N H"]:
    """Attention by tiles of queries; see the API of the package for the equation."""
    out, _ = _attention_fwd(q, k, v, mask, terms)
    return out


def _attention_fwd(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> tuple[Float[Array, "B T N H"], _Residuals]:
    grid = shard_grid(q, k)
    outs = []
    saved = []
    for shard in grid.shards():
        q_shard = _queries_heads_first(shard.of_queries(q), grid.group)
        k_shard = _keys_heads_first(shard.of_keys(k))
        v_shard = _keys_heads_first(shard.of_keys(v))
        out, lse = forward(
            q_shard,
            k_shard,
            v_shard,
            shard.batch,
            mask=shard.of_mask(mask),
            terms=shard.of_terms(terms),
        )
        outs.append(_heads_last(out, shard.batch))
        saved.append(Saved(q_shard, k_shard, v_shard, out, lse))
    return grid.join(outs), _Residuals(saved, mask, terms, grid)


def _attention_bwd(
    residuals: _Residuals, g: Float[Array, "B T N H"]
) -> tuple[Array, Array, Array, None, ScoreTerms]:
    mask = residuals.mask
    terms = residuals.terms
    grid = residuals.grid

    # The shards are those of the forward pass, in the same order.
    dterms = zero_gradients(terms)
    dqs = []
    dks = []
    dvs = []
    for shard, saved in zip(grid.shards(), residuals.shards, strict=True):
        g_shard = _queries_heads_first(shard.of_queries(g), grid.group)
        dq, dk, dv, dterms_shard = backward(
            saved, g_shard, shard.batch, mask=shard.of_mask(mask), terms=shard.of_terms(terms)
        )
        dqs.append(_heads_last(dq, shard.batch))
        # [BK, S, H] -> [BK, 1, S, H]: key/value heads are groups of one head each.
        dks.append(_heads_last(dk[:, None], shard.batch))
        dvs.append(_heads_last(dv[:, None], shard.batch))
        dterms = _add_shard(dterms, dterms_shard, shard)

    dterms = jax.tree.map(lambda gradient, term: gradient.astype(term.dtype), dterms, terms)
    dq = grid.join(dqs)
    dk = grid.join(dks)
    dv = grid.join(dvs)
    return dq, dk, dv, None, dterms


attention.defvjp(_attention_fwd, _attention_bwd)


def forward_pass(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: AttentionMask,
    terms: ScoreTerms,
) -> ForwardResult:
    """Implements `passes.Passes.forward_pass`."""
    out, residuals = _attention_fwd(q, k, v, mask, terms)
    lses = []
    for shard, saved in zip(residuals.grid.shards(), residuals.shards, strict=True):
        lses.append(_heads_last(saved.lse, shard.batch))
    # [B, T, N, 1] -> [B, T, N]
    lse = residuals.grid.join(lses)
    return ForwardResult(out, lse[..., 0])


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
    grid = shard_grid(q, k)
    saved = []
    for shard in grid.shards():
        saved.append(
            Saved(
                q=_queries_heads_first(shard.of_queries(q), grid.group),
                k=_keys_heads_first(shard.of_keys(k)),
                v=_keys_heads_first(shard.of_keys(v)),
                out=_queries_heads_first(shard.of_queries(result.out), grid.group),
                lse=_queries_heads_first(shard.of_queries(result.lse[..., None]), grid.group),
            )
        )
    residuals = _Residuals(saved, mask, terms, grid)
    dq, dk, dv, _, dterms = _attention_bwd(residuals, g)
    return dq, dk, dv, dterms


def _add_shard(dterms: ScoreTerms, dterms_shard: ScoreTerms, shard: Shard) -> ScoreTerms:
    """Adds the terms' gradients of one shard; shards add up where they share a broadcast axis."""

    def add(whole: Array, part: Array) -> Array:
        index = shard.term_index(whole)
        return whole.at[index].add(part)

    return jax.tree.map(add, dterms, dterms_shard)


def _queries_heads_first(x: Float[Array, "B T N H"], group: int) -> Float[Array, "BK G T H"]:
    batch, length, heads, width = x.shape
    # [B, T, N, H] -> [B, N, T, H] -> [B * K, G, T, H]
    x = jnp.swapaxes(x, 1, 2)
    kv_heads = heads // group
    return x.reshape(batch * kv_heads, group, length, width)


def _keys_heads_first(x: Float[Array, "B S K H"]) -> Float[Array, "BK S H"]:
    # [B, S, K, H] -> [B * K, 1, S, H] -> [B * K, S, H]
    x = _queries_heads_first(x, group=1)
    return x[:, 0]


def _heads_last(x: Float[Array, "BK G T H"], batch: int) -> Float[Array, "B T N H"]:
    _, _, length, width = x.shape
    # [B * K, G, T, H] -> [B, N, T, H] -> [B, T, N, H]
    x = x.reshape(batch, -1, length, width)
    return jnp.swapaxes(x, 1, 2)

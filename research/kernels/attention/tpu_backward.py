"""The backward pass on TPU: a block of keys against the tiles of resident queries that see it, in
five products a tile.

Tiles lie the other way round, keys down and queries across, so that what belongs to a query is a
row of lanes.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.kernels.attention.tpu_forward import VMEM_LIMIT
from research.kernels.attention.tpu_operands import Operands, bias_tile, gather
from research.kernels.attention.tpu_plan import Blocks, Tiles, cover, plan, visibility
from research.kernels.attention.tpu_tile import Rules, Side, scores, side


def backward_tiles(mask: AttentionMask, queries: int, keys: int, blocks: Blocks) -> list[Tiles]:
    """Returns the tiles of queries that each block of keys visits, one plan a resident chunk of
    queries.
    """
    some, every = (x.swapaxes(1, 2) for x in visibility(mask, queries, keys, blocks))
    step = blocks.resident // blocks.queries
    parts = [slice(start, start + step) for start in range(0, some.shape[2], step)]
    return [plan(some[..., part], every[..., part], some[..., part].shape[2]) for part in parts]


def backward(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    g: Float[Array, "B N T H"],
    log_total: Float[Array, "B N 1 T"],
    delta: Float[Array, "B N 1 T"],
    mask: AttentionMask,
    terms: ScoreTerms,
    blocks: Blocks,
    interpret: Any,
) -> tuple[Float[Array, "B N T H"], Float[Array, "B K S H"], Float[Array, "B K S H"]]:
    """Returns the gradients of q, k and v.

    Args:
      log_total: of the forward pass.
      delta: Σ_h g · out of each query.

    Source: Dao 2023 (FlashAttention-2), arXiv:2307.08691, algorithm 2; the gradient of q is summed
        in fast memory.
    """
    rules = Rules.of(mask, terms, q.shape[2], k.shape[2])
    grouped = k.shape[1] != q.shape[1]
    # Several heads or chunks of queries give to the same key: their shares meet in float32.
    exact = grouped or q.shape[2] > blocks.resident
    dqs, dk, dv = [], None, None
    for index, tiles in enumerate(backward_tiles(mask, q.shape[2], k.shape[2], blocks)):
        here = slice(index * blocks.resident, min((index + 1) * blocks.resident, q.shape[2]))
        operands = Operands.of(*_part(mask, terms, here), axes=range(3))
        _add(
            operands,
            q[:, :, here],
            k,
            v,
            g[:, :, here],
            log_total[..., here],
            delta[..., here],
            blocks,
        )
        dq, dk_share, dv_share = _call(operands, rules, blocks, tiles, here, q, v, exact, interpret)
        dqs.append(dq)
        dk, dv = (dk_share, dv_share) if dk is None else (dk + dk_share, dv + dv_share)
        # One chunk after the other, so that the shares of one alone are held.
        q, g, dk, dv = jax.lax.optimization_barrier((q, g, dk, dv))

    def per_key(shares: Array, like: Array) -> Array:
        whole = (
            shares.reshape(*like.shape[:2], -1, *like.shape[2:]).sum(axis=2) if grouped else shares
        )
        return whole.astype(like.dtype)

    return jnp.concatenate(dqs, axis=2), per_key(dk, k), per_key(dv, v)


def _part(mask: AttentionMask, terms: ScoreTerms, here: slice) -> tuple[AttentionMask, ScoreTerms]:
    """Returns what concerns a chunk of queries."""
    tokens = {name: getattr(mask, name) for name in ("q_positions", "q_segments")}
    mask = dataclasses.replace(
        mask, **{name: x if x is None else x[:, here] for name, x in tokens.items()}
    )
    bias = terms.bias
    if bias is not None and bias.shape[2] > 1:
        terms = dataclasses.replace(terms, bias=bias[:, :, here])
    return mask, terms


def _add(
    operands: Operands,
    q: Array,
    k: Array,
    v: Array,
    g: Array,
    log_total: Array,
    delta: Array,
    blocks: Blocks,
) -> None:
    width, group = q.shape[3], q.shape[1] // k.shape[1]
    resident = cover(q.shape[2], blocks.queries) * blocks.queries
    for name, array in (("q", q), ("g", g)):
        operands.add(name, array, (1, 1, resident, width), lambda b, n, j: (b, n, 0, 0))
    for name, array in (("log_total", log_total), ("delta", delta)):
        operands.add(name, array, (1, 1, 1, resident), lambda b, n, j: (b, n, 0, 0))
    for name, array in (("k", k), ("v", v)):
        operands.add(
            name,
            array,
            (1, 1, blocks.keys, width),
            lambda b, n, j: (b, jax.lax.div(n, group), j, 0),
        )
    operands.add_tokens("q", resident, lambda b, n, j: 0)
    operands.add_tokens("kv", blocks.keys, lambda b, n, j: j)
    operands.add_bias(resident, blocks.keys, lambda b, n, j: (b, n, 0, j))


def _call(
    operands: Operands,
    rules: Rules,
    blocks: Blocks,
    tiles: Tiles,
    here: slice,
    q: Array,
    v: Array,
    exact: bool,
    interpret: Any,
) -> tuple[Array, Array, Array]:
    """Runs the kernel for a chunk of queries; the gradients of k and v are one a query head."""
    batch, heads, _, width = q.shape
    keys, length = v.shape[2], here.stop - here.start
    resident = cover(length, blocks.queries) * blocks.queries
    shared = jax.ShapeDtypeStruct((batch, heads, keys, width), jnp.float32 if exact else v.dtype)
    of_keys = operands.spec((1, 1, blocks.keys, width), lambda b, n, j: (b, n, j, 0))
    return pl.pallas_call(
        functools.partial(
            _kernel,
            rules,
            blocks,
            resident // blocks.queries,
            tiles.rows,
            here.start,
            operands.names,
        ),
        out_shape=(jax.ShapeDtypeStruct((batch, heads, length, width), q.dtype), shared, shared),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(batch, heads, cover(keys, blocks.keys)),
            in_specs=operands.specs,
            out_specs=(
                operands.spec((1, 1, resident, width), lambda b, n, j: (b, n, 0, 0)),
                of_keys,
                of_keys,
            ),
            scratch_shapes=[
                pltpu.VMEM((resident, width), jnp.float32),
                pltpu.VMEM((blocks.keys, width), jnp.float32),
                pltpu.VMEM((blocks.keys, width), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT
        ),
        name="tessera_attention_backward",
        interpret=interpret,
    )(tiles.counts, tiles.order, *operands.arrays)


def _kernel(
    rules: Rules,
    blocks: Blocks,
    chunk: int,
    rows: int,
    first: int,
    names: tuple[str, ...],
    counts: Any,
    order: Any,
    *rest: Any,
) -> None:
    *inputs, dq_ref, dk_ref, dv_ref, dq_sum, dk_sum, dv_sum = rest
    batch, head, block = (pl.program_id(axis) for axis in range(3))
    refs = gather(names, inputs, batch, head)
    visit = (batch if rows > 1 else 0) * pl.num_programs(2) + block

    @pl.when(block == 0)
    def _start() -> None:
        dq_sum[...] = jnp.zeros_like(dq_sum)

    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)
    keys = side(refs, "kv", block * blocks.keys, 0, blocks.keys, axis=0)

    def tile(masked: bool, index: Any, _: None) -> None:
        at = pl.multiple_of(order[visit * chunk + index] * blocks.queries, blocks.queries)
        _tile(rules, blocks, refs, keys, first + at, at, masked, (dq_sum, dk_sum, dv_sum))

    unmasked, visited = counts[2 * visit], counts[2 * visit + 1]
    jax.lax.fori_loop(0, unmasked, functools.partial(tile, False), None)
    jax.lax.fori_loop(unmasked, visited, functools.partial(tile, True), None)
    dk_ref[0, 0] = (dk_sum[...] * rules.scale).astype(dk_ref.dtype)
    dv_ref[0, 0] = dv_sum[...].astype(dv_ref.dtype)

    @pl.when(block == pl.num_programs(2) - 1)
    def _finish() -> None:
        dq_ref[0, 0] = (dq_sum[...] * rules.scale).astype(dq_ref.dtype)


def _tile(
    rules: Rules,
    blocks: Blocks,
    refs: Any,
    keys: Side,
    start: Any,
    at: Any,
    masked: bool,
    state: tuple,
) -> None:
    """Adds a tile of queries, `at` tokens into the resident ones, to the three gradients."""
    dq_sum, dk_sum, dv_sum = state
    here = pl.ds(at, blocks.queries)
    operands = load(rules, refs, keys, start, here, masked)
    weights, dscores, _ = tile_gradients(rules, refs, operands, keys, start, at, here, masked)
    q, k, g = operands["q"], operands["k"], operands["g"]
    dscores = dscores.astype(k.dtype)
    dv_sum[...] += jnp.dot(weights.astype(g.dtype), g, preferred_element_type=jnp.float32)
    dk_sum[...] += jnp.dot(dscores, q, preferred_element_type=jnp.float32)
    dq = jax.lax.dot_general(
        dscores, k, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    dq_sum[here, :] += dq


def load(
    rules: Rules, refs: Any, keys: Side, start: Any, here: Any, masked: bool
) -> dict[str, Array]:
    """Returns the operands of a tile; past the ends, where memory holds anything, they are
    zeros.
    """
    found = {name: refs[name][0, 0, here, :] for name in ("q", "g")}
    found |= {name: refs[name][0, 0] for name in ("k", "v")}
    found |= {name: refs[name][0, 0, :, here] for name in ("log_total", "delta")}
    if masked and rules.queries % here.size:
        row = start + jax.lax.broadcasted_iota(jnp.int32, (here.size, 1), 0)
        lane = start + jax.lax.broadcasted_iota(jnp.int32, (1, here.size), 1)
        inside = {"q": row < rules.queries, "g": row < rules.queries}
        inside |= dict.fromkeys(("log_total", "delta"), lane < rules.queries)
        found |= {
            name: jnp.where(is_in, found[name], jnp.zeros_like(found[name]))
            for name, is_in in inside.items()
        }
    if masked and rules.keys % keys.index.shape[0]:
        real = keys.index < rules.keys
        found |= {
            name: jnp.where(real, found[name], jnp.zeros_like(found[name])) for name in ("k", "v")
        }
    return found


def tile_gradients(
    rules: Rules,
    refs: Any,
    operands: dict[str, Array],
    keys: Side,
    start: Any,
    at: Any,
    here: Any,
    masked: bool,
) -> tuple[
    Float[Array, "keys queries"], Float[Array, "keys queries"], Float[Array, "keys queries"]
]:
    """Returns the weights of a tile, the gradient of q kᵀ but for the scale, and that of the
    bias.
    """
    k, v, q, g = (operands[name] for name in ("k", "v", "q", "g"))
    products = jax.lax.dot_general(
        k, q, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    queries = side(refs, "q", start, at, here.size, axis=1)
    s, slope = scores(
        rules,
        refs,
        products,
        queries,
        keys,
        lambda: bias_tile(refs["bias"], here, slice(None)).T,
        masked,
    )
    weights = jnp.exp2(s - operands["log_total"])
    dweights = jax.lax.dot_general(
        v, g, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    dscores = weights * (dweights - operands["delta"])
    return weights, dscores if slope is None else dscores * slope, dscores

"""The forward kernel of attention on Hopper GPUs.

A block holds 128 queries of a head, 64 per warpgroup, and visits the blocks of keys that its mask
does not hide. A third warpgroup copies keys and values into a ring of buffers. The two that compute
alternate: while one has the tensor cores, the other computes its softmax. The division by the
denominator comes last.

Source: Shah et al. 2024 (FlashAttention-3), arXiv:2407.08608, section 3.1, without its pipelining
inside a warpgroup.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from research.kernels.attention.gpu_plan import ROWS, TILE, WARPGROUPS, Plan
from research.kernels.attention.gpu_scores import Tile, scores
from research.kernels.attention.gpu_tile import (
    HIDDEN,
    LOG2E,
    along,
    arrange_schedule,
    feed,
    launch,
    own_buffers,
    product,
    ring,
    ring_slot,
    specialize,
    spread,
    store,
    swizzled,
    zeros,
)
from research.kernels.attention.gpu_visits import Visits, read_visits, visits

# Steps whose keys and values shared memory holds.
STAGES = 2


def keys_per_step(width: int) -> int:
    """Returns how many keys a step takes.

    It is what registers and shared memory have room for, next to the result.
    """
    return 128 if width <= 128 else 64


def forward(
    plan: Plan,
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    extras: dict[str, Array],
    kinds: Int[Array, "sequences q_blocks kv_blocks"],
) -> tuple[Float[Array, "B T N H"], Float[Array, "B N T"]]:
    """Returns the result and lse, the logsumexp of each row of scores to base 2, sink included.

    lse is +inf where there is no sink and a query attends to no key.

    Args:
      plan: the static plan.
      q, k, v: padded by `pad_tokens`.
      extras: of `gpu_plan.extra_arrays`.
      kinds: of `block_kinds`, with `TILE` queries and `keys_per_step` keys per block.
    """
    batch, queries, heads, width = q.shape
    order, counts = visits(kinds)
    out_type = [
        jax.ShapeDtypeStruct(q.shape, v.dtype),
        jax.ShapeDtypeStruct((batch, heads, queries), jnp.float32),
    ]
    kernel = launch(
        plan,
        functools.partial(_forward_block, plan, tuple(extras)),
        out_type,
        _scratch(width, q.dtype),
        head=heads,
        tile=queries // TILE,
        batch=batch,
    )
    out, lse = kernel(q, k, v, order, counts, *extras.values())
    return out, lse


def _scratch(width: int, dtype: Any) -> dict[str, Any]:
    """Returns the shared memory of a block and its barriers, by name."""
    keys = keys_per_step(width)
    full = plgpu.Barrier(num_barriers=STAGES)
    free = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES)
    return {
        "q_smem": swizzled((WARPGROUPS, ROWS, width), dtype),
        "k_smem": swizzled((STAGES, keys, width), dtype),
        "v_smem": swizzled((STAGES, keys, width), dtype),
        "lse_smem": plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        "q_full": plgpu.Barrier(num_barriers=WARPGROUPS),
        "k_full": full,
        "v_full": full,
        "k_free": free,
        "v_free": free,
        "turns": plgpu.Barrier(num_arrivals=WARPGROUPS),
    }


@dataclasses.dataclass(frozen=True)
class _Block:
    """What a block of the grid works on.

    Attributes:
      plan: the static plan.
      extras: the refs of `gpu_plan.extra_arrays`.
      batch, head, warpgroup: indices.
      query: the first query of the warpgroup.
      visits: the keys that its queries visit.
      scratch: its shared memory and barriers.
    """

    plan: Plan
    extras: dict[str, Any]
    batch: Array
    head: Array
    warpgroup: Array
    query: Array
    visits: Visits
    scratch: dict[str, Any]


class _Softmax(NamedTuple):
    """The online softmax of a warpgroup's queries over the keys visited so far.

    Attributes:
      out: Σ 2^(s − top) v, not yet divided by the denominator.
      top: the greatest score.
      denominator: Σ 2^(s − top).
    """

    out: Float[Array, "T H"]
    top: Float[Array, "T"]
    denominator: Float[Array, "T"]


def _forward_block(
    plan: Plan,
    names: tuple[str, ...],
    q_ref: Any,
    k_ref: Any,
    v_ref: Any,
    order_ref: Any,
    counts_ref: Any,
    *refs: Any,
    **scratch: Any,
) -> None:
    *extra_refs, out_ref, lse_ref = refs
    batch = lax.axis_index("batch")
    head = lax.axis_index("head")
    # Late tiles of a causal mask have the most to do: they start first.
    tiles = order_ref.shape[1]
    tile = tiles - 1 - lax.axis_index("tile")
    warpgroup = lax.axis_index("warpgroup")
    keys = scratch["k_smem"].shape[1]
    block = _Block(
        plan=plan,
        extras=dict(zip(names, extra_refs, strict=True)),
        batch=batch,
        head=head,
        warpgroup=warpgroup,
        # Tile 3: the first warpgroup has queries 384:448, the second one 448:512.
        query=tile * TILE + warpgroup * ROWS,
        visits=read_visits(order_ref, counts_ref, batch, tile, keys),
        scratch=scratch,
    )

    def compute() -> None:
        rows = pl.ds(block.query, ROWS)
        q = own_buffers(scratch, "q")
        q.copy(q_ref.at[batch, rows, head], warpgroup)
        q_TxH = q.wait(warpgroup)

        out, lse = _attend(block, q_TxH)
        # The queries' shared memory is free by now.
        out = out.astype(out_ref.dtype)
        store(out, q_TxH, out_ref.at[batch, rows, head])
        lse_smem = scratch["lse_smem"].at[warpgroup]
        store(lse, lse_smem, lse_ref.at[batch, head, rows])

    def copy() -> None:
        _copy_keys(block, k_ref, v_ref)

    specialize(warpgroup, compute, copy)


def _copy_keys(block: _Block, k_ref: Any, v_ref: Any) -> None:
    """Copies the keys and values of all visits into their rings."""
    k = ring(block.scratch, "k")
    v = ring(block.scratch, "v")
    kv_head = lax.div(block.head, jnp.int32(block.plan.group))

    def copy(step: Array, slot: Array) -> None:
        tokens = pl.ds(block.visits.start(step), block.visits.tokens)
        k.copy(k_ref.at[block.batch, tokens, kv_head], slot)
        v.copy(v_ref.at[block.batch, tokens, kv_head], slot)

    feed(block.visits.total, STAGES, (k.free, v.free), copy)


def _attend(block: _Block, q_TxH: Any) -> tuple[Float[Array, "T H"], Float[Array, "T"]]:
    """Returns the result of a warpgroup's queries, and the logsumexp of their scores."""
    turns = block.scratch["turns"]
    start = _empty_softmax(block, width=q_TxH.shape[-1])

    def step(index: Array, softmax: _Softmax, masked: bool) -> _Softmax:
        return _visit_keys(block, q_TxH, index, softmax, masked=masked)

    # The second warpgroup starts half a step later: its softmax runs during the other's matmuls.
    pl.when(block.warpgroup == 1)(lambda: arrange_schedule(turns))
    softmax = block.visits.fold(step, start)
    pl.when(block.warpgroup == 0)(lambda: arrange_schedule(turns))

    out, top, denominator = softmax
    any_visible = denominator > 0
    divisor = jnp.where(any_visible, denominator, 1.0)
    lse = top + jnp.log(divisor) * LOG2E
    lse = jnp.where(any_visible, lse, jnp.inf)
    out *= along(1.0 / divisor, 0, out.shape)
    return out, lse


def _empty_softmax(block: _Block, width: int) -> _Softmax:
    """Returns the softmax before any key: of the sink alone, where there is one."""
    plan = block.plan
    # Half of HIDDEN: where all keys of a row are hidden, 2^(HIDDEN - top) is 0.
    least = jnp.full((ROWS,), HIDDEN / 2, jnp.float32)
    top = spread(plan, least, axis=0)
    denominator = zeros(plan, ROWS, axis=0)
    if "sinks" in block.extras:
        # A sink is a score whose value is zero: the sums start with it.
        top = denominator + block.extras["sinks"][block.head] * LOG2E
        denominator = denominator + 1.0
    return _Softmax(zeros(plan, ROWS, width), top, denominator)


def _visit_keys(
    block: _Block, q_TxH: Any, index: Array, softmax: _Softmax, *, masked: bool
) -> _Softmax:
    """Adds the keys of one step to the softmax of a warpgroup's queries."""
    plan = block.plan
    k = ring(block.scratch, "k")
    v = ring(block.scratch, "v")
    turns = block.scratch["turns"]
    slot = ring_slot(index, STAGES)

    # [T, H] x [S, H]ᵀ -> [T, S]
    k_SxH = k.wait(slot)
    raw_TxS = product(
        plan, q_TxH, k_SxH, transpose_b=True, meanwhile=lambda: arrange_schedule(turns)
    )
    k.release(slot)

    tile = Tile(
        block.batch,
        block.head,
        query=block.query,
        key=block.visits.start(index),
        shape=raw_TxS.shape,
    )
    scores_TxS, _ = scores(plan, block.extras, raw_TxS, tile, masked=masked)

    # A greater score makes what was summed before smaller.
    top = jnp.maximum(softmax.top, jnp.max(scores_TxS, axis=1))
    weights_TxS = jnp.exp2(scores_TxS - along(top, 0, scores_TxS.shape))
    shrink = jnp.exp2(softmax.top - top)
    denominator = softmax.denominator * shrink + jnp.sum(weights_TxS, axis=1)
    out_TxH = softmax.out * along(shrink, 0, softmax.out.shape)

    # Without the barrier the compiler moves the softmax past the turns, into the other warpgroup's
    # matmuls.
    weights_TxS = weights_TxS.astype(q_TxH.dtype)
    out_TxH, top, denominator, weights_TxS = lax.optimization_barrier(
        (out_TxH, top, denominator, weights_TxS)
    )
    plgpu.barrier_arrive(turns)
    v_SxH = v.wait(slot)
    plgpu.barrier_wait(turns)

    # [T, S] x [S, H] -> [T, H]
    out_TxH = product(plan, weights_TxS, v_SxH, out_TxH)
    v.release(slot)
    return _Softmax(out_TxH, top, denominator)

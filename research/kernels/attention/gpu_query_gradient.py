"""The kernel of the gradient of the queries on Hopper GPUs.

A block holds 128 queries of a head, 64 per warpgroup, and visits the keys that they attend to.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from research.kernels.attention.gpu_backward import (
    STEP,
    Operands,
    load_statistics,
    ring_stages,
    score_gradients,
    scratch,
)
from research.kernels.attention.gpu_plan import ROWS, TILE, Plan
from research.kernels.attention.gpu_scores import Tile
from research.kernels.attention.gpu_tile import (
    feed,
    launch,
    own_buffers,
    product,
    ring,
    ring_slot,
    specialize,
    store,
    zeros,
)
from research.kernels.attention.gpu_visits import Visits, read_visits, visits


def query_gradient(
    plan: Plan,
    operands: Operands,
    extras: dict[str, Array],
    kinds: Int[Array, "sequences q_blocks kv_blocks"],
) -> Float[Array, "B T N H"]:
    """Returns the gradient of the queries.

    Args:
      plan: the static plan.
      operands: padded.
      extras: of `gpu_plan.extra_arrays`.
      kinds: of `block_kinds`, with `TILE` queries and `STEP` keys per block.
    """
    q = operands.q
    batch, queries, heads, width = q.shape
    kernel = launch(
        plan,
        functools.partial(_query_block, plan, tuple(extras)),
        jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch(width, q.dtype, own=("q", "g"), copied=("k", "v")),
        head=heads,
        tile=queries // TILE,
        batch=batch,
    )
    order, counts = visits(kinds)
    return kernel(*operands, order, counts, *extras.values())


@dataclasses.dataclass(frozen=True)
class _Block:
    """What a block of the grid works on.

    Attributes:
      plan: the static plan.
      operands: the refs.
      extras: the refs of `gpu_plan.extra_arrays`.
      batch, head, warpgroup: indices.
      query: the first query of the warpgroup.
      visits: the keys that its queries visit.
      scratch: its shared memory and barriers.
    """

    plan: Plan
    operands: Operands
    extras: dict[str, Any]
    batch: Array
    head: Array
    warpgroup: Array
    query: Array
    visits: Visits
    scratch: dict[str, Any]

    @property
    def stages(self) -> int:
        """Steps that the rings hold."""
        return ring_stages(self.operands.q.shape[-1])


def _query_block(plan: Plan, names: tuple[str, ...], *refs: Any, **scratch: Any) -> None:
    # The six operands, order and counts of the visits, the extras, and the result.
    *operand_refs, order_ref, counts_ref = refs[:8]
    *extra_refs, dq_ref = refs[8:]
    batch = lax.axis_index("batch")
    # Late tiles of a causal mask have the most to do: they start first.
    tiles = order_ref.shape[1]
    tile = tiles - 1 - lax.axis_index("tile")
    warpgroup = lax.axis_index("warpgroup")
    block = _Block(
        plan=plan,
        operands=Operands(*operand_refs),
        extras=dict(zip(names, extra_refs, strict=True)),
        batch=batch,
        head=lax.axis_index("head"),
        warpgroup=warpgroup,
        # Tile 3: the first warpgroup has queries 384:448, the second one 448:512.
        query=tile * TILE + warpgroup * ROWS,
        visits=read_visits(order_ref, counts_ref, batch, tile, STEP),
        scratch=scratch,
    )

    def compute() -> None:
        _sum_over_keys(block, dq_ref)

    def copy() -> None:
        _copy_keys(block)

    specialize(warpgroup, compute, copy)


def _copy_keys(block: _Block) -> None:
    """Copies the keys and values of all visits into their rings."""
    k = ring(block.scratch, "k")
    v = ring(block.scratch, "v")

    def copy(step: Array, slot: Array) -> None:
        # [B, S, K, H] -> [64, H]
        tokens = pl.ds(block.visits.start(step), STEP)
        kv_head = lax.div(block.head, jnp.int32(block.plan.group))
        part = (block.batch, tokens, kv_head)
        k.copy(block.operands.k.at[part], slot)
        v.copy(block.operands.v.at[part], slot)

    feed(block.visits.total, block.stages, (k.free, v.free), copy)


def _sum_over_keys(block: _Block, dq_ref: Any) -> None:
    """Stores the gradient of a warpgroup's queries."""
    plan = block.plan
    operands = block.operands
    width = operands.q.shape[-1]
    part = (block.batch, pl.ds(block.query, ROWS), block.head)

    q = own_buffers(block.scratch, "q")
    g = own_buffers(block.scratch, "g")
    q.copy(operands.q.at[part], block.warpgroup)
    g.copy(operands.g.at[part], block.warpgroup)
    q_TxH = q.wait(block.warpgroup)
    g_TxH = g.wait(block.warpgroup)

    own_tile = Tile(
        block.batch, block.head, query=block.query, key=jnp.int32(0), shape=(ROWS, STEP)
    )
    # One number per query, which stays in registers over all visits.
    statistics = load_statistics(plan, operands, own_tile)

    def step(index: Array, dq: Array, masked: bool) -> Array:
        return _visit_keys(block, q_TxH, g_TxH, statistics, own_tile, index, dq, masked=masked)

    # q kᵀ is scaled, and so is its gradient: once per query, and not once per step.
    dq = block.visits.fold(step, zeros(plan, ROWS, width))
    dq = (dq * plan.scale).astype(dq_ref.dtype)
    # The queries' shared memory is free by now.
    store(dq, q_TxH, dq_ref.at[part])


def _visit_keys(
    block: _Block,
    q_TxH: Any,
    g_TxH: Any,
    statistics: tuple[Array, Array],
    own_tile: Tile,
    index: Array,
    dq: Float[Array, "T H"],
    *,
    masked: bool,
) -> Float[Array, "T H"]:
    """Adds what the keys of one step give to the gradient of a warpgroup's queries."""
    plan = block.plan
    k = ring(block.scratch, "k")
    v = ring(block.scratch, "v")
    slot = ring_slot(index, block.stages)

    # [T, H] x [S, H]ᵀ -> [T, S]
    k_SxH = k.wait(slot)
    raw_TxS = product(plan, q_TxH, k_SxH, transpose_b=True)
    v_SxH = v.wait(slot)
    dweights_TxS = product(plan, g_TxH, v_SxH, transpose_b=True)
    v.release(slot)

    tile = dataclasses.replace(own_tile, key=block.visits.start(index))
    gradients = score_gradients(
        plan, block.extras, raw_TxS, dweights_TxS, statistics, tile, masked=masked
    )
    # [T, S] x [S, H] -> [T, H]
    dproduct_TxS = gradients.product.astype(k_SxH.dtype)
    dq = product(plan, dproduct_TxS, k_SxH, dq)
    k.release(slot)
    return dq

"""The kernel of the gradients of keys and values, and of a bias per key, on Hopper GPUs.

A block holds 128 keys of a key/value head, 64 per warpgroup, and visits the queries that attend to
them, of all heads of the group. Its tiles of scores are transposed, `[S, T]`: keys are rows.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from research.kernels.attention.gpu_backward import (
    STEP,
    Operands,
    load_statistics,
    ring_stages,
    score_gradients,
    scratch,
)
from research.kernels.attention.gpu_plan import ROWS, TILE, WARPGROUPS, Plan
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


def key_gradients(
    plan: Plan,
    operands: Operands,
    extras: dict[str, Array],
    kinds: Int[Array, "sequences q_blocks kv_blocks"],
    wanted: tuple[str, ...],
) -> dict[str, Array]:
    """Returns gradients by name: `dk` of the keys, `dv` of the values, `dbias` of a bias per key.

    The last one is `[B, N, S]` in float32, a sum over the queries. It comes with `dk` only.

    Args:
      plan: the static plan.
      operands: padded.
      extras: of `gpu_plan.extra_arrays`, with the bias transposed to `[B, N, S, T]`.
      kinds: of `block_kinds`, with `STEP` queries and `TILE` keys per block.
      wanted: names. At head widths whose two sums do not fit in the registers, ask for one at a
          time.
    """
    q = operands.q
    k = operands.k
    batch, keys, kv_heads, width = k.shape
    tokens = jax.ShapeDtypeStruct(k.shape, k.dtype)
    types = {
        "dk": tokens,
        "dv": tokens,
        "dbias": jax.ShapeDtypeStruct((batch, q.shape[2], keys), jnp.float32),
    }
    memory = scratch(width, q.dtype, own=("k", "v"), copied=("q", "g"))
    memory["sum_smem"] = plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)
    kernel = launch(
        plan,
        functools.partial(_key_block, plan, tuple(extras), wanted),
        [types[name] for name in wanted],
        memory,
        head=kv_heads,
        tile=keys // TILE,
        batch=batch,
    )
    # Here the blocks of keys visit those of queries.
    order, counts = visits(jnp.swapaxes(kinds, 1, 2))
    gradients = kernel(*operands, order, counts, *extras.values())
    return dict(zip(wanted, gradients, strict=True))


@dataclasses.dataclass(frozen=True)
class _Block:
    """What a block of the grid works on.

    Attributes:
      plan: the static plan.
      operands: the refs.
      extras: the refs of `gpu_plan.extra_arrays`.
      outs: the refs of the gradients that are wanted, by name.
      batch, kv_head, warpgroup: indices.
      key: the first key of the warpgroup.
      visits: the queries of each head that its keys visit.
      scratch: its shared memory and barriers.
    """

    plan: Plan
    operands: Operands
    extras: dict[str, Any]
    outs: dict[str, Any]
    batch: Array
    kv_head: Array
    warpgroup: Array
    key: Array
    visits: Visits
    scratch: dict[str, Any]

    @property
    def stages(self) -> int:
        """Steps that the rings hold."""
        return ring_stages(self.operands.q.shape[-1])

    def head(self, member: Array) -> Array:
        """Returns the query head of a member of the group."""
        return self.kv_head * self.plan.group + member


def _key_block(
    plan: Plan, names: tuple[str, ...], wanted: tuple[str, ...], *refs: Any, **scratch: Any
) -> None:
    # The six operands, order and counts of the visits, the extras, and the results.
    *operand_refs, order_ref, counts_ref = refs[:8]
    extra_refs = refs[8 : 8 + len(names)]
    out_refs = refs[8 + len(names) :]
    batch = lax.axis_index("batch")
    tile = lax.axis_index("tile")
    warpgroup = lax.axis_index("warpgroup")
    block = _Block(
        plan=plan,
        operands=Operands(*operand_refs),
        extras=dict(zip(names, extra_refs, strict=True)),
        outs=dict(zip(wanted, out_refs, strict=True)),
        batch=batch,
        kv_head=lax.axis_index("head"),
        warpgroup=warpgroup,
        # Tile 3: the first warpgroup has keys 384:448, the second one 448:512.
        key=tile * TILE + warpgroup * ROWS,
        visits=read_visits(order_ref, counts_ref, batch, tile, STEP),
        scratch=scratch,
    )

    def compute() -> None:
        _store_gradients(block)

    def copy() -> None:
        _copy_queries(block)

    specialize(warpgroup, compute, copy)


def _copy_queries(block: _Block) -> None:
    """Copies the queries of all visits and their result's gradients into their rings."""
    q = ring(block.scratch, "q")
    g = ring(block.scratch, "g")
    visits_per_head = block.visits.total

    def copy(step: Array, slot: Array) -> None:
        # Three visits per head: step 4 is visit 1 of head 1 of the group.
        head = block.head(lax.div(step, visits_per_head))
        visit = lax.rem(step, visits_per_head)
        tokens = pl.ds(block.visits.start(visit), STEP)
        part = (block.batch, tokens, head)
        q.copy(block.operands.q.at[part], slot)
        g.copy(block.operands.g.at[part], slot)

    steps = visits_per_head * block.plan.group
    feed(steps, block.stages, (q.free, g.free), copy)


def _store_gradients(block: _Block) -> None:
    """Computes and stores the gradients of a warpgroup's keys and values."""
    plan = block.plan
    outs = block.outs
    part = (block.batch, pl.ds(block.key, ROWS), block.kv_head)

    k = own_buffers(block.scratch, "k")
    k.copy(block.operands.k.at[part], block.warpgroup)
    k_SxH = k.wait(block.warpgroup)
    v = own_buffers(block.scratch, "v")
    v.copy(block.operands.v.at[part], block.warpgroup)
    v_SxH = v.wait(block.warpgroup)

    sums = _sum_over_group(block, k_SxH, v_SxH)

    # The keys' and values' shared memory is free by now.
    if "dk" in outs:
        dk = sums["dk"] * plan.scale
        store(dk.astype(outs["dk"].dtype), k_SxH, outs["dk"].at[part])
    if "dv" in outs:
        dv = sums["dv"].astype(outs["dv"].dtype)
        store(dv, v_SxH, outs["dv"].at[part])


def _sum_over_group(block: _Block, k_SxH: Any, v_SxH: Any) -> dict[str, Array]:
    """Returns `dk` and `dv` of a warpgroup's keys, `[S, H]`; stores `dbias` of every head."""
    plan = block.plan
    outs = block.outs
    width = k_SxH.shape[-1]

    def visit_head(member: Array, sums: dict[str, Array]) -> dict[str, Array]:
        # dk and dv are sums over the heads of the group; dbias is each head's own.
        if "dbias" in outs:
            sums = {**sums, "dbias": zeros(plan, ROWS, axis=0)}

        def step(index: Array, sums: dict[str, Array], masked: bool) -> dict[str, Array]:
            return _visit_queries(block, k_SxH, v_SxH, member, index, sums, masked=masked)

        sums = block.visits.fold(step, sums)
        if "dbias" in outs:
            sums = dict(sums)
            head = block.head(member)
            target = outs["dbias"].at[block.batch, head, pl.ds(block.key, ROWS)]
            sum_smem = block.scratch["sum_smem"].at[block.warpgroup]
            store(sums.pop("dbias"), sum_smem, target)
        return sums

    start = {name: zeros(plan, ROWS, width) for name in ("dk", "dv") if name in outs}
    return lax.fori_loop(0, plan.group, visit_head, start)


def _visit_queries(
    block: _Block,
    k_SxH: Any,
    v_SxH: Any,
    member: Array,
    index: Array,
    sums: dict[str, Array],
    *,
    masked: bool,
) -> dict[str, Array]:
    """Adds what the queries of one step give to the gradients of a warpgroup's keys."""
    plan = block.plan
    q = ring(block.scratch, "q")
    g = ring(block.scratch, "g")
    # One ring for all heads: its slots continue from head to head.
    slot = ring_slot(member * block.visits.total + index, block.stages)
    tile = Tile(
        block.batch,
        block.head(member),
        query=block.visits.start(index),
        key=block.key,
        shape=(ROWS, STEP),
        transposed=True,
    )

    # [S, H] x [T, H]ᵀ -> [S, T]
    q_TxH = q.wait(slot)
    raw_SxT = product(plan, k_SxH, q_TxH, transpose_b=True)
    g_TxH = g.wait(slot)
    # The values' gradient does not need it, and no compiler removes an unused matmul of the tensor
    # cores.
    if "dk" in sums:
        dweights_SxT = product(plan, v_SxH, g_TxH, transpose_b=True)
    else:
        dweights_SxT = zeros(plan, ROWS, STEP)

    gradients = score_gradients(
        plan,
        block.extras,
        raw_SxT,
        dweights_SxT,
        load_statistics(plan, block.operands, tile),
        tile,
        masked=masked,
    )
    # [S, T] x [T, H] -> [S, H]
    sums = dict(sums)
    if "dv" in sums:
        weights_SxT = gradients.weights.astype(g_TxH.dtype)
        sums["dv"] = product(plan, weights_SxT, g_TxH, sums["dv"])
    g.release(slot)
    # [S, T] -> [S]
    if "dbias" in sums:
        sums["dbias"] += jnp.sum(gradients.scores, axis=1)
    if "dk" in sums:
        dproduct_SxT = gradients.product.astype(q_TxH.dtype)
        sums["dk"] = product(plan, dproduct_SxT, q_TxH, sums["dk"])
    q.release(slot)
    return sums

"""The kernel of the gradient of a bias for every query and key on Hopper GPUs.

A block holds a tile of 128 queries, 64 per warpgroup, and 64 keys of the bias, and visits the
sequences and heads that share it.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from research.kernels.attention.gpu_backward import Operands, load_statistics, score_gradients
from research.kernels.attention.gpu_plan import ROWS, TILE, WARPGROUPS, Plan
from research.kernels.attention.gpu_scores import Tile
from research.kernels.attention.gpu_tile import (
    Buffers,
    feed,
    launch,
    product,
    ring_slot,
    specialize,
    store,
    swizzled,
    zeros,
)
from research.kernels.attention.gpu_visits import HIDDEN_BLOCK


def bias_gradient(
    plan: Plan,
    operands: Operands,
    extras: dict[str, Array],
    kinds: Int[Array, "sequences q_blocks kv_blocks"],
    shared: tuple[int, int],
) -> Float[Array, "#B #N T S"]:
    """Returns the gradient of a bias for every query and key, in float32.

    It is summed over the sequences and heads that share the bias.

    Args:
      plan: the static plan.
      operands: padded.
      extras: of `gpu_plan.extra_arrays`.
      kinds: of `block_kinds`, with `TILE` queries and `ROWS` keys per block.
      shared: the sequences and the heads of the bias, B or 1 and N or 1.
    """
    q = operands.q
    _, queries, _, width = q.shape
    keys = operands.k.shape[1]
    batches, heads = shared
    kernel = launch(
        plan,
        functools.partial(_bias_block, plan, tuple(extras)),
        jax.ShapeDtypeStruct((batches, heads, queries, keys), jnp.float32),
        _scratch(width, q.dtype),
        keys=keys // ROWS,
        tile=queries // TILE,
        pair=batches * heads,
    )
    # A block that is hidden in all sequences visits nothing.
    active = jnp.any(kinds < HIDDEN_BLOCK, axis=0).astype(jnp.int32)
    return kernel(*operands, active, *extras.values())


def _stages(width: int) -> int:
    """Returns how many steps shared memory holds: a step has four operands."""
    return 2 if width <= 128 else 1


def _scratch(width: int, dtype: Any) -> dict[str, Any]:
    """Returns the shared memory of a block and its barriers, by name."""
    stages = _stages(width)
    # A step is q and g for each warpgroup, and k and v for both.
    copies = 2 * WARPGROUPS + 2
    return {
        "q_smem": swizzled((stages, WARPGROUPS, ROWS, width), dtype),
        "g_smem": swizzled((stages, WARPGROUPS, ROWS, width), dtype),
        "k_smem": swizzled((stages, ROWS, width), dtype),
        "v_smem": swizzled((stages, ROWS, width), dtype),
        "out_smem": swizzled((WARPGROUPS, ROWS, ROWS), jnp.float32),
        "full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        "free": plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
    }


@dataclasses.dataclass(frozen=True)
class _Sharers:
    """The sequences and heads that share an element of the bias.

    Attributes:
      batch, head: those of the element; None where all sequences, or all heads, share it.
      heads: how many heads share it.
      count: how many pairs of a sequence and a head share it.
    """

    batch: Array | None
    head: Array | None
    heads: int
    count: int

    def pair(self, step: Array) -> tuple[Array, Array]:
        """Returns the sequence and the head that a step visits."""
        # Shared by 2 sequences and 3 heads: step 4 is sequence 1, head 1.
        heads = jnp.int32(self.heads)
        batch = lax.div(step, heads) if self.batch is None else self.batch
        head = lax.rem(step, heads) if self.head is None else self.head
        return batch, head


def _sharers(q_ref: Any, out_ref: Any, batch: Array, head: Array) -> _Sharers:
    """Returns who shares the bias at an index of its sequences and heads."""
    all_batches, _, all_heads, _ = q_ref.shape
    batches, heads = out_ref.shape[:2]
    sharing_batches = 1
    if batches == 1:
        sharing_batches = all_batches
        batch = None
    sharing_heads = 1
    if heads == 1:
        sharing_heads = all_heads
        head = None
    return _Sharers(batch, head, heads=sharing_heads, count=sharing_batches * sharing_heads)


@dataclasses.dataclass(frozen=True)
class _Block:
    """What a block of the grid works on.

    Attributes:
      plan: the static plan.
      operands: the refs.
      extras: the refs of `gpu_plan.extra_arrays`.
      tile: its tile of queries.
      key: its first key.
      sharers: the sequences and heads that it visits.
      steps: how many visits.
      scratch: its shared memory and barriers.
    """

    plan: Plan
    operands: Operands
    extras: dict[str, Any]
    tile: Array
    key: Array
    sharers: _Sharers
    steps: Array
    scratch: dict[str, Any]

    @property
    def stages(self) -> int:
        """Steps that the rings hold."""
        return _stages(self.operands.q.shape[-1])

    def query(self, warpgroup: Any) -> Array:
        """Returns the first query of a warpgroup."""
        # Tile 3: the first warpgroup has queries 384:448, the second one 448:512.
        return self.tile * TILE + warpgroup * ROWS


def _bias_block(plan: Plan, names: tuple[str, ...], *refs: Any, **scratch: Any) -> None:
    # The six operands, the active blocks, the extras, and the result.
    *operand_refs, active_ref = refs[:7]
    *extra_refs, out_ref = refs[7:]
    operands = Operands(*operand_refs)
    key_block = lax.axis_index("keys")
    tile = lax.axis_index("tile")
    pair = lax.axis_index("pair")
    warpgroup = lax.axis_index("warpgroup")

    # A bias of 2 sequences and 3 heads: pair 4 is sequence 1, head 1.
    heads = jnp.int32(out_ref.shape[1])
    batch = lax.div(pair, heads)
    head = lax.rem(pair, heads)
    sharers = _sharers(operands.q, out_ref, batch, head)
    block = _Block(
        plan=plan,
        operands=operands,
        extras=dict(zip(names, extra_refs, strict=True)),
        tile=tile,
        key=key_block * ROWS,
        sharers=sharers,
        steps=sharers.count * active_ref[tile, key_block],
        scratch=scratch,
    )

    def compute() -> None:
        query = block.query(warpgroup)
        dbias = _sum_over_sharers(block, warpgroup, query)
        target = out_ref.at[batch, head, pl.ds(query, ROWS), pl.ds(block.key, ROWS)]
        store(dbias, scratch["out_smem"].at[warpgroup], target)

    def copy() -> None:
        _copy_operands(block)

    specialize(warpgroup, compute, copy)


def _sum_over_sharers(block: _Block, warpgroup: Array, query: Array) -> Float[Array, "T S"]:
    """Returns the gradient of a warpgroup's rows of the bias."""
    plan = block.plan
    scratch = block.scratch

    def step(index: Array, dbias_TxS: Array) -> Array:
        batch, head = block.sharers.pair(index)
        tile = Tile(batch, head, query, block.key, shape=(ROWS, ROWS))
        slot = ring_slot(index, block.stages)

        # [T, H] x [S, H]ᵀ -> [T, S]
        plgpu.barrier_wait(scratch["full"].at[slot])
        q_TxH = scratch["q_smem"].at[slot, warpgroup]
        k_SxH = scratch["k_smem"].at[slot]
        raw_TxS = product(plan, q_TxH, k_SxH, transpose_b=True)
        g_TxH = scratch["g_smem"].at[slot, warpgroup]
        v_SxH = scratch["v_smem"].at[slot]
        dweights_TxS = product(plan, g_TxH, v_SxH, transpose_b=True)
        plgpu.barrier_arrive(scratch["free"].at[slot])

        gradients = score_gradients(
            plan,
            block.extras,
            raw_TxS,
            dweights_TxS,
            load_statistics(plan, block.operands, tile),
            tile,
            # The sharers' blocks may differ: all of them are masked.
            masked=True,
        )
        return dbias_TxS + gradients.scores

    start = zeros(plan, ROWS, ROWS)
    return lax.fori_loop(0, block.steps, step, start)


def _copy_operands(block: _Block) -> None:
    """Copies the operands of all steps into their rings, which share their barriers."""
    operands = block.operands
    scratch = block.scratch
    full = scratch["full"]
    keys = pl.ds(block.key, ROWS)

    def copy(step: Array, slot: Array) -> None:
        batch, head = block.sharers.pair(step)
        # [B, T, N, H] -> [64, H] for each warpgroup
        for name, ref in (("q", operands.q), ("g", operands.g)):
            for half in range(WARPGROUPS):
                queries = pl.ds(block.query(half), ROWS)
                plgpu.copy_gmem_to_smem(
                    ref.at[batch, queries, head],
                    scratch[f"{name}_smem"].at[slot, half],
                    full.at[slot],
                )

        # [B, S, K, H] -> [64, H] for both
        kv_head = lax.div(head, jnp.int32(block.plan.group))
        for name, ref in (("k", operands.k), ("v", operands.v)):
            buffers = Buffers(scratch[f"{name}_smem"], full)
            buffers.copy(ref.at[batch, keys, kv_head], slot)

    feed(block.steps, block.stages, (scratch["free"],), copy)

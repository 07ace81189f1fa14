"""The kernel of decode attention for TPU: it copies the pages itself, a block ahead of the
arithmetic.

A program of the grid computes one sequence for some key/value heads. It loops over the blocks of
pages that the sequence's length and window need. Each array of pages has a buffer of two slots:
while a block in one slot is computed, the next one is copied into the other. The next block is one
of this sequence or, after its last, the first of the next sequence that has any.

Shapes in names: GT are the rows of a key/value head, G query heads times T new tokens; S the keys
of a block; H the head width.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from research.kernels.decode_attention.tpu_copies import PageCopies, Plan, Refs, name_refs

LANES = 128
SUBLANES = 8
LOG2E = math.log2(math.e)
# Scores are in units of log 2. That of a masked key is so far below the initial maximum that exp2
# of the difference is 0.
MASKED = -1e30
INITIAL_MAX = -0.5e30


def kernel(plan: Plan, *arguments: Any) -> None:
    """Computes one sequence for some heads; `arguments` are the references of `Refs`."""
    refs = name_refs(plan, arguments)
    head_block = pl.program_id(0)
    sequence = pl.program_id(1)
    length = refs.lengths[sequence]
    first_page = refs.first_pages[sequence]
    end_page = refs.end_pages[sequence]
    # Pages 3:9 in blocks of 4 pages: 2 blocks
    pages = end_page - first_page
    blocks = jax.lax.div(pages + plan.block_pages - 1, plan.block_pages)
    copies = PageCopies(plan, refs, head_block)

    refs.max_scores[...] = jnp.full_like(refs.max_scores, INITIAL_MAX)
    refs.denominators[...] = jnp.zeros_like(refs.denominators)
    refs.weighted_values[...] = jnp.zeros_like(refs.weighted_values)

    # The first block of all has no program before it that could copy it.
    is_first = refs.blocks_before[sequence] == 0

    @pl.when(is_first & (blocks > 0))
    def _() -> None:
        copies.start(refs.table, first_page, end_page, 0)

    def step(index: Array, _: None) -> None:
        # Slots alternate over the blocks of all sequences: 3 and 2 blocks use 0 1 0, 1 0.
        block = refs.blocks_before[sequence] + index
        slot = jax.lax.rem(block, 2)
        other_slot = 1 - slot
        page = first_page + index * plan.block_pages
        next_index = index + 1

        @pl.when(next_index < blocks)
        def _() -> None:
            next_page = page + plan.block_pages
            copies.start(refs.table, next_page, end_page, other_slot)

        # After the last block, the first one of the next sequence that has any is copied.
        batch = pl.num_programs(1)
        has_next = refs.next_sequences[sequence] < batch

        @pl.when((next_index == blocks) & has_next)
        def _() -> None:
            following = jnp.minimum(refs.next_sequences[sequence], batch - 1)
            its_first = refs.first_pages[following]
            its_end = refs.end_pages[following]
            copies.start(refs.next_table, its_first, its_end, other_slot)

        copies.wait(page, end_page, slot)
        first_key = page * plan.page_size
        _add_block(plan, refs, slot, head_block, first_key, length)

    jax.lax.fori_loop(0, blocks, step, None)
    _finish(refs)


@dataclasses.dataclass(frozen=True)
class _Block:
    """A block of keys and values in fast memory.

    Attributes:
      slot: of the buffers.
      head_block: of the program.
      distance_GTxS: position of the row minus that of the key.
      visible_GTxS: whether the row attends to the key; None if all do.
      visible_Sx1: whether any row may attend to the key; None if all do.
    """

    slot: Array
    head_block: Array
    distance_GTxS: Int[Array, "rows S"]
    visible_GTxS: Bool[Array, "rows S"] | None = None
    visible_Sx1: Bool[Array, "S 1"] | None = None


def _add_block(
    plan: Plan, refs: Refs, slot: Array, head_block: Array, first_key: Array, length: Array
) -> None:
    """Adds a block of keys, the first of position `first_key`, to the sums of every head."""
    # The first query is at length - T; it must see the last key of the block, and the last query
    # the first key.
    end_key = first_key + plan.block
    first_query_end = length - plan.queries + 1
    unmasked = end_key <= first_query_end
    if plan.window is not None:
        unmasked &= first_key >= length - plan.window

    def add(masked: bool) -> None:
        block = _block(plan, slot, head_block, first_key, length, masked)

        def add_heads(index: Array, _: None) -> None:
            for offset in range(plan.unrolled):
                head = index * plan.unrolled + offset
                _add_head(plan, refs, block, head)

        steps = plan.heads // plan.unrolled
        jax.lax.fori_loop(0, steps, add_heads, None)

    @pl.when(unmasked)
    def _() -> None:
        add(masked=False)

    @pl.when(jnp.logical_not(unmasked))
    def _() -> None:
        add(masked=True)


def _block(
    plan: Plan, slot: Array, head_block: Array, first_key: Array, length: Array, masked: bool
) -> _Block:
    """Returns a block with the distances of its keys and, if it is masked, its masks."""
    # T = 2, G = 2, length 10: rows 0 1 2 3 have positions 8 9 8 9.
    row_GTx1 = jax.lax.broadcasted_iota(jnp.int32, (plan.height, 1), 0)
    token_GTx1 = jax.lax.rem(row_GTx1, plan.queries)
    first_position = length - plan.queries
    position_GTx1 = first_position + token_GTx1
    slot_1xS = jax.lax.broadcasted_iota(jnp.int32, (1, plan.block), 1)
    key_1xS = first_key + slot_1xS
    distance_GTxS = position_GTx1 - key_1xS
    if not masked:
        return _Block(slot, head_block, distance_GTxS)

    visible_GTxS = distance_GTxS >= 0
    if plan.window is not None:
        visible_GTxS &= distance_GTxS < plan.window

    # Some row attends to a key from the first row's window up to the sequence's end.
    slot_Sx1 = jax.lax.broadcasted_iota(jnp.int32, (plan.block, 1), 0)
    key_Sx1 = first_key + slot_Sx1
    visible_Sx1 = key_Sx1 < length
    if plan.window is not None:
        before_window = length - plan.queries - plan.window
        visible_Sx1 &= key_Sx1 > before_window
    return _Block(slot, head_block, distance_GTxS, visible_GTxS, visible_Sx1)


def _add_head(plan: Plan, refs: Refs, block: _Block, head: Any) -> None:
    """Adds a block to the sums of one head: a step of online softmax."""
    k_SxH, v_SxH = (buffer[block.slot, head] for buffer in refs.buffers[:2])
    if v_SxH.dtype != refs.q.dtype:
        k_SxH = _widen(k_SxH, refs.q.dtype)
        v_SxH = _widen(v_SxH, refs.q.dtype)
    if block.visible_Sx1 is not None:
        # Slots that nobody wrote may hold NaN, and a weight of zero times NaN is NaN.
        wide_SxH = v_SxH.astype(jnp.float32)
        kept_SxH = jnp.where(block.visible_Sx1, wide_SxH, 0.0)
        v_SxH = kept_SxH.astype(v_SxH.dtype)

    # Buffers of scales hold all heads, not only those of the program.
    first_head = block.head_block * plan.heads
    scale_rows = pl.ds(first_head + head, 1)
    scales_1xS = [buffer[block.slot, scale_rows] for buffer in refs.buffers[2:]]

    q_GTxH = refs.q[0, head]
    scores_GTxS = _scores(plan, refs, q_GTxH, k_SxH, scales_1xS[:1], head, block.distance_GTxS)
    if block.visible_GTxS is not None:
        scores_GTxS = jnp.where(block.visible_GTxS, scores_GTxS, MASKED)

    # Maxima and denominators are repeated over lanes: [GT, 128].
    old_max = refs.max_scores[head]
    block_max_GTx1 = jnp.max(scores_GTxS, axis=1, keepdims=True)
    new_max = jnp.maximum(old_max, block_max_GTx1)
    weights_GTxS = jnp.exp2(scores_GTxS - new_max[:, :1])
    rescale = jnp.exp2(old_max - new_max)
    refs.max_scores[head] = new_max
    rescaled = refs.denominators[head] * rescale
    block_sum_GTx1 = jnp.sum(weights_GTxS, axis=1, keepdims=True)
    refs.denominators[head] = rescaled + block_sum_GTx1

    if plan.quantized:
        weights_GTxS *= scales_1xS[1]
        if block.visible_GTxS is not None:
            weights_GTxS = jnp.where(block.visible_GTxS, weights_GTxS, 0.0)

    # [GT, S] [S, H] -> [GT, H]
    weights_GTxS = weights_GTxS.astype(v_SxH.dtype)
    added_GTxH = jax.lax.dot_general(
        weights_GTxS, v_SxH, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    rescaled_GTxH = refs.weighted_values[head] * rescale[:, :1]
    refs.weighted_values[head] = rescaled_GTxH + added_GTxH


def _widen(x: Array, dtype: Any) -> Array:
    """Returns 8-bit numbers in the type of the queries; chips that have no direct conversion go
    through float32.
    """
    wide = x.astype(jnp.float32)
    return wide.astype(dtype)


def _scores(
    plan: Plan,
    refs: Refs,
    q_GTxH: Float[Array, "rows H"],
    k_SxH: Float[Array, "S H"],
    key_scale: list[Float[Array, "1 S"]],
    head: Any,
    distance_GTxS: Int[Array, "rows S"],
) -> Float[Array, "rows S"]:
    """Returns the scores of a head in units of log 2; `key_scale` has one array or none."""
    # [GT, H] [S, H] -> [GT, S]
    scores_GTxS = jax.lax.dot_general(
        q_GTxH, k_SxH, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    for scale_1xS in key_scale:
        scores_GTxS *= scale_1xS

    if plan.softcap is None:
        scores_GTxS *= plan.scale * LOG2E
    else:
        bounded_GTxS = jnp.tanh(scores_GTxS * (plan.scale / plan.softcap))
        scores_GTxS = bounded_GTxS * (plan.softcap * LOG2E)

    if "alibi" in refs.extras:
        slope_GTx1 = refs.extras["alibi"][0, head]
        slope_GTx1 = slope_GTx1 * LOG2E
        scores_GTxS -= slope_GTx1 * distance_GTxS.astype(jnp.float32)
    return scores_GTxS


def _finish(refs: Refs) -> None:
    """Divides the weighted values by the denominators, sinks included, and writes the result."""
    max_score = refs.max_scores[...]
    denominator = refs.denominators[...]
    out = refs.weighted_values[...]
    # Rows of negative position attend to nothing, and get zeros even with a sink.
    any_visible = denominator > 0

    if "sinks" in refs.extras:
        sink = refs.extras["sinks"][0]
        sink = sink * LOG2E
        new_max = jnp.maximum(max_score, sink)
        rescale = jnp.exp2(max_score - new_max)
        sink_weight = jnp.exp2(sink - new_max)
        denominator = denominator * rescale + sink_weight
        out *= rescale[:, :, :1]

    # [heads, GT, H] / [heads, GT, 1], of the lanes that are all the same
    divisor = jnp.where(any_visible, denominator, 1.0)
    out = out / divisor[:, :, :1]
    refs.out[0] = out.astype(refs.out.dtype)

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
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

LANES = 128
SUBLANES = 8
LOG2E = math.log2(math.e)
# Scores are in units of log 2. That of a masked key is so far below the initial maximum that exp2
# of the difference is 0.
MASKED = -1e30
INITIAL_MAX = -0.5e30


@dataclasses.dataclass(frozen=True)
class Plan:
    """All that is static about a call.

    Attributes:
      queries: T.
      group: G.
      height: G · T in whole tiles of fast memory.
      heads: key/value heads of one program.
      unrolled: how many of them are computed in one step of the loop over heads.
      page_size: tokens of a page.
      block_pages: pages of a block.
      window, softcap, scale: of the call.
      given: names of the optional arrays: `alibi`, `sinks`.
      quantized: whether there are scales.
    """

    queries: int
    group: int
    height: int
    heads: int
    unrolled: int
    page_size: int
    block_pages: int
    window: int | None
    softcap: float | None
    scale: float
    given: tuple[str, ...]
    quantized: bool

    @property
    def block(self) -> int:
        """S, the tokens of a block."""
        return self.block_pages * self.page_size


@dataclasses.dataclass(frozen=True)
class _Refs:
    """The references of the kernel, in the order of `tpu.paged_attention`.

    Attributes:
      lengths: tokens of each sequence.
      first_pages, end_pages: the range of its table entries that are read.
      blocks_before: blocks of all sequences before it.
      next_sequences: the next sequence that has blocks.
      table, next_table: table rows of this sequence and of the next.
      q: queries, [1, heads, GT, H].
      extras: the optional arrays by name.
      pages: keys, values, and their scales if there are any.
      out: the result, like q.
      buffers: for each of `pages`, two slots of a block.
      semaphores: of the copies into each slot.
      max_scores: the largest score of each row so far, repeated over lanes.
      denominators: Σ exp2(score - max), repeated over lanes.
      weighted_values: Σ exp2(score - max) v.
    """

    lengths: Any
    first_pages: Any
    end_pages: Any
    blocks_before: Any
    next_sequences: Any
    table: Any
    next_table: Any
    q: Any
    extras: dict[str, Any]
    pages: tuple[Any, ...]
    out: Any
    buffers: tuple[Any, ...]
    semaphores: Any
    max_scores: Any
    denominators: Any
    weighted_values: Any


def _name_refs(plan: Plan, refs: tuple[Any, ...]) -> _Refs:
    fixed = refs[:8]
    rest = refs[8:]
    extras = dict(zip(plan.given, rest, strict=False))

    # alibi?, sinks?, then k, v, (scales), out, buffers of k, v, (scales), semaphores, sums
    rest = rest[len(plan.given) :]
    count = 4 if plan.quantized else 2
    pages = rest[:count]
    out = rest[count]
    buffers = rest[count + 1 : 2 * count + 1]
    semaphores, *sums = rest[2 * count + 1 :]
    return _Refs(*fixed, extras, pages, out, buffers, semaphores, *sums)


def kernel(plan: Plan, *arguments: Any) -> None:
    """Computes one sequence for some heads; `arguments` are the references of `_Refs`."""
    refs = _name_refs(plan, arguments)
    head_block = pl.program_id(0)
    sequence = pl.program_id(1)
    length = refs.lengths[sequence]
    first_page = refs.first_pages[sequence]
    end_page = refs.end_pages[sequence]
    blocks = jax.lax.div(end_page - first_page + plan.block_pages - 1, plan.block_pages)
    copies = _Copies(plan, refs, head_block)

    refs.max_scores[...] = jnp.full_like(refs.max_scores, INITIAL_MAX)
    refs.denominators[...] = jnp.zeros_like(refs.denominators)
    refs.weighted_values[...] = jnp.zeros_like(refs.weighted_values)

    # The first block of all has no program before it that could copy it.
    @pl.when((refs.blocks_before[sequence] == 0) & (blocks > 0))
    def _() -> None:
        copies.start(refs.table, first_page, end_page, 0)

    def step(index: Array, _: None) -> None:
        # Slots alternate over the blocks of all sequences: 3 and 2 blocks use 0 1 0, 1 0.
        slot = jax.lax.rem(refs.blocks_before[sequence] + index, 2)
        page = first_page + index * plan.block_pages

        @pl.when(index + 1 < blocks)
        def _() -> None:
            copies.start(refs.table, page + plan.block_pages, end_page, 1 - slot)

        @pl.when((index + 1 == blocks) & (refs.next_sequences[sequence] < pl.num_programs(1)))
        def _() -> None:
            following = jnp.minimum(refs.next_sequences[sequence], pl.num_programs(1) - 1)
            its_first = refs.first_pages[following]
            its_end = refs.end_pages[following]
            copies.start(refs.next_table, its_first, its_end, 1 - slot)

        copies.wait(page, end_page, slot)
        _add_block(plan, refs, slot, head_block, page * plan.page_size, length)

    jax.lax.fori_loop(0, blocks, step, None)
    _finish(refs)


@dataclasses.dataclass(frozen=True)
class _Copies:
    """The copies of pages into the slots of the buffers."""

    plan: Plan
    refs: _Refs
    head_block: Array

    def start(self, table: Any, first: Array, end: Array, slot: Array | int) -> None:
        """Starts the copies of a block: of table entries from `first`, and before `end`."""

        def start_page(index: Array, _: None) -> None:
            for copy in self._of_page(table[0, 0, first + index], index, slot):
                copy.start()

        count = jnp.minimum(end - first, self.plan.block_pages)
        jax.lax.fori_loop(0, count, start_page, None)

    def wait(self, first: Array, end: Array, slot: Array) -> None:
        """Waits for the copies that `start` started with the same range and slot."""

        def wait_page(index: Array, _: None) -> None:
            # A wait needs the size of the copy only, which is the same for every page.
            for copy in self._of_page(0, index, slot):
                copy.wait()

        count = jnp.minimum(end - first, self.plan.block_pages)
        jax.lax.fori_loop(0, count, wait_page, None)

    def _of_page(self, page: Array | int, index: Array, slot: Array | int) -> list[Any]:
        """Returns the copies of one page to its index in a block: keys, values, and scales."""
        size = self.plan.page_size
        # Page 2 of a block of pages of 128 tokens goes to tokens 256 to 383.
        tokens = pl.ds(pl.multiple_of(index * size, size), size)
        heads = pl.ds(self.head_block * self.plan.heads, self.plan.heads)

        copies = []
        for pages, buffer in zip(self.refs.pages, self.refs.buffers, strict=True):
            target = buffer.at[slot, :, tokens]
            is_scale = len(pages.shape) == 3
            # Scales of all heads share tiles of memory, which are copied whole.
            source = pages.at[page] if is_scale else pages.at[page, heads]
            semaphore = self.refs.semaphores.at[slot]
            copies.append(pltpu.make_async_copy(source, target, semaphore))
        return copies


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
    plan: Plan, refs: _Refs, slot: Array, head_block: Array, first_key: Array, length: Array
) -> None:
    """Adds a block of keys, the first of position `first_key`, to the sums of every head."""
    # The first query is at length - T; it must see the last key of the block, and the last query
    # the first key.
    unmasked = first_key + plan.block <= length - plan.queries + 1
    if plan.window is not None:
        unmasked &= first_key >= length - plan.window

    def add(masked: bool) -> None:
        block = _block(plan, slot, head_block, first_key, length, masked)

        def add_heads(index: Array, _: None) -> None:
            for offset in range(plan.unrolled):
                _add_head(plan, refs, block, index * plan.unrolled + offset)

        jax.lax.fori_loop(0, plan.heads // plan.unrolled, add_heads, None)

    pl.when(unmasked)(functools.partial(add, masked=False))
    pl.when(jnp.logical_not(unmasked))(functools.partial(add, masked=True))


def _block(
    plan: Plan, slot: Array, head_block: Array, first_key: Array, length: Array, masked: bool
) -> _Block:
    """Returns a block with the distances of its keys and, if it is masked, its masks."""
    # T = 2, G = 2, length 10: rows 0 1 2 3 have positions 8 9 8 9.
    row_GTx1 = jax.lax.broadcasted_iota(jnp.int32, (plan.height, 1), 0)
    position_GTx1 = length - plan.queries + jax.lax.rem(row_GTx1, plan.queries)
    key_1xS = first_key + jax.lax.broadcasted_iota(jnp.int32, (1, plan.block), 1)
    distance_GTxS = position_GTx1 - key_1xS
    if not masked:
        return _Block(slot, head_block, distance_GTxS)

    visible_GTxS = distance_GTxS >= 0
    if plan.window is not None:
        visible_GTxS &= distance_GTxS < plan.window

    key_Sx1 = first_key + jax.lax.broadcasted_iota(jnp.int32, (plan.block, 1), 0)
    visible_Sx1 = key_Sx1 < length
    if plan.window is not None:
        visible_Sx1 &= key_Sx1 > length - plan.queries - plan.window
    return _Block(slot, head_block, distance_GTxS, visible_GTxS, visible_Sx1)


def _add_head(plan: Plan, refs: _Refs, block: _Block, head: Any) -> None:
    """Adds a block to the sums of one head: a step of online softmax."""
    k_SxH, v_SxH = (buffer[block.slot, head] for buffer in refs.buffers[:2])
    if v_SxH.dtype != refs.q.dtype:
        k_SxH = _widen(k_SxH, refs.q.dtype)
        v_SxH = _widen(v_SxH, refs.q.dtype)
    if block.visible_Sx1 is not None:
        # Slots that nobody wrote may hold NaN, and a weight of zero times NaN is NaN.
        kept_SxH = jnp.where(block.visible_Sx1, v_SxH.astype(jnp.float32), 0.0)
        v_SxH = kept_SxH.astype(v_SxH.dtype)
    # Buffers of scales hold all heads, not only those of the program.
    scales_1xS = [
        buffer[block.slot, pl.ds(block.head_block * plan.heads + head, 1)]
        for buffer in refs.buffers[2:]
    ]

    q_GTxH = refs.q[0, head]
    scores_GTxS = _scores(plan, refs, q_GTxH, k_SxH, scales_1xS[:1], head, block.distance_GTxS)
    if block.visible_GTxS is not None:
        scores_GTxS = jnp.where(block.visible_GTxS, scores_GTxS, MASKED)

    old_max = refs.max_scores[head]
    new_max = jnp.maximum(old_max, jnp.max(scores_GTxS, axis=1, keepdims=True))
    weights_GTxS = jnp.exp2(scores_GTxS - new_max[:, :1])
    rescale = jnp.exp2(old_max - new_max)
    refs.max_scores[head] = new_max
    rescaled = refs.denominators[head] * rescale
    refs.denominators[head] = rescaled + jnp.sum(weights_GTxS, axis=1, keepdims=True)

    if plan.quantized:
        weights_GTxS *= scales_1xS[1]
        if block.visible_GTxS is not None:
            weights_GTxS = jnp.where(block.visible_GTxS, weights_GTxS, 0.0)
    # [GT, S] [S, H] -> [GT, H]
    added_GTxH = jax.lax.dot_general(
        weights_GTxS.astype(v_SxH.dtype),
        v_SxH,
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    refs.weighted_values[head] = refs.weighted_values[head] * rescale[:, :1] + added_GTxH


def _widen(x: Array, dtype: Any) -> Array:
    """Returns 8-bit numbers in the type of the queries; chips that have no direct conversion go
    through float32.
    """
    return x.astype(jnp.float32).astype(dtype)


def _scores(
    plan: Plan,
    refs: _Refs,
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
        bounded = jnp.tanh(scores_GTxS * (plan.scale / plan.softcap))
        scores_GTxS = bounded * (plan.softcap * LOG2E)

    if "alibi" in refs.extras:
        slope_GTx1 = refs.extras["alibi"][0, head] * LOG2E
        scores_GTxS -= slope_GTx1 * distance_GTxS.astype(jnp.float32)
    return scores_GTxS


def _finish(refs: _Refs) -> None:
    """Divides the weighted values by the denominators, sinks included, and writes the result."""
    max_score = refs.max_scores[...]
    denominator = refs.denominators[...]
    out = refs.weighted_values[...]
    # Rows of negative position attend to nothing, and get zeros even with a sink.
    any_visible = denominator > 0

    if "sinks" in refs.extras:
        sink = refs.extras["sinks"][0] * LOG2E
        new_max = jnp.maximum(max_score, sink)
        rescale = jnp.exp2(max_score - new_max)
        denominator = denominator * rescale + jnp.exp2(sink - new_max)
        out *= rescale[:, :, :1]

    divisor = jnp.where(any_visible, denominator, 1.0)[:, :, :1]
    refs.out[0] = (out / divisor).astype(refs.out.dtype)

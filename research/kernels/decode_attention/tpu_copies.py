"""The copies of pages of decode attention for TPU, and what they and its kernel have in common: the
plan of a call, and the references of a program.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array


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
class Refs:
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


def name_refs(plan: Plan, refs: tuple[Any, ...]) -> Refs:
    """Returns the references of a program by name."""
    fixed = refs[:8]
    rest = refs[8:]
    extras = dict(zip(plan.given, rest, strict=False))

    # alibi?, sinks?, then k, v, (scales), out, buffers of k, v, (scales), semaphores, sums
    num_extras = len(plan.given)
    rest = rest[num_extras:]
    count = 4 if plan.quantized else 2
    pages = rest[:count]
    out = rest[count]
    rest = rest[count + 1 :]
    buffers = rest[:count]
    semaphores, *sums = rest[count:]
    return Refs(*fixed, extras, pages, out, buffers, semaphores, *sums)


@dataclasses.dataclass(frozen=True)
class PageCopies:
    """The copies of pages into the slots of the buffers."""

    plan: Plan
    refs: Refs
    head_block: Array

    def start(self, table: Any, first: Array, end: Array, slot: Array | int) -> None:
        """Starts the copies of a block: of table entries from `first`, and before `end`."""

        def start_page(index: Array, _: None) -> None:
            page = table[0, 0, first + index]
            for copy in self._of_page(page, index, slot):
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
        # Page 2 of a block of pages of 128 tokens goes to tokens 256:384.
        first_token = pl.multiple_of(index * size, size)
        tokens = pl.ds(first_token, size)
        # With 4 heads per program, program 1 has heads 4:8.
        first_head = self.head_block * self.plan.heads
        heads = pl.ds(first_head, self.plan.heads)

        copies = []
        for pages, buffer in zip(self.refs.pages, self.refs.buffers, strict=True):
            target = buffer.at[slot, :, tokens]
            is_scale = len(pages.shape) == 3
            # Scales of all heads share tiles of memory, which are copied whole.
            source = pages.at[page] if is_scale else pages.at[page, heads]
            semaphore = self.refs.semaphores.at[slot]
            copy = pltpu.make_async_copy(source, target, semaphore)
            copies.append(copy)
        return copies

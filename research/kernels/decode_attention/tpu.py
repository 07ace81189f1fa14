"""Decode attention for TPU: a Pallas kernel that fetches the pages itself."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from research.kernels.attention import ScoreTerms
from research.kernels.decode_attention.pages import QUANTIZED, KVPages, page_range
from research.kernels.decode_attention.rows import fold, per_row, unfold
from research.kernels.decode_attention.tpu_copies import Plan
from research.kernels.decode_attention.tpu_kernel import LANES, SUBLANES, kernel
from research.kernels.rounding import round_up
from research.parallel.target import chip, platform

# Tokens of a block.
BLOCK = 512
# The most bytes of a core's fast memory that both slots of the page buffers take, and the sums.
BUFFERS = 8 * 2**20
SUMS = 4 * 2**20
MAX_PAGE = 2048
# Query rows of a key/value head: what a matmul takes at a time, twice.
MAX_ROWS = 256
# Chips whose two cores share one memory and one program.
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")
# Heads that one step of the kernel's loop over heads computes.
UNROLLED = 4


def page_size_fault(page_size: int, dtype: str) -> str | None:
    """Returns why pages of a size are not taken, with the nearest that is."""
    unit = LANES if dtype in QUANTIZED else SUBLANES
    if page_size % unit == 0 and page_size <= MAX_PAGE:
        return None
    nearest = min(round_up(page_size, unit), MAX_PAGE)
    return f"in {dtype}: it takes multiples of {unit}, such as {nearest}"


def unsupported_reason(
    q: Float[Array, "B T N H"], pages: KVPages, window: int | None, terms: ScoreTerms
) -> str | None:
    """Returns the rule that a call breaks, with the nearest value that it allows."""
    kv_heads, page_size, width = pages.key.shape[1:]
    dtype = pages.key.dtype.name
    if platform() != "tpu":
        return f"{platform()}: it needs a TPU"
    for name, its_dtype in (("queries", q.dtype), ("pages", pages.key.dtype)):
        if its_dtype == jnp.float16:
            return f"{name} in float16: it takes them in bfloat16 or float32"

    # XLA lays out rows that are no whole lanes in another order, and would copy all pages at every
    # call.
    if width % LANES:
        nearest = round_up(width, LANES)
        return (
            f"pages of head_dim = {width}: it takes multiples of {LANES}, such as {nearest}, with "
            "zeros"
        )
    fault = page_size_fault(page_size, dtype)
    if fault is not None:
        return f"page_size = {page_size} {fault}"
    # Scales, [pages, K, page_size], need whole sublanes for the same reason.
    if pages.quantized and kv_heads not in (1, 2, 4) and kv_heads % SUBLANES:
        unit = 4 if kv_heads < 4 else SUBLANES
        nearest = round_up(kv_heads, unit)
        return (
            f"num_kv_heads = {kv_heads} in {dtype}: it takes 1, 2, 4 or multiples of 8, as "
            f"{nearest}"
        )
    rows = q.shape[1] * q.shape[2] // kv_heads
    if rows > MAX_ROWS:
        return f"{rows} query rows per key/value head: it takes at most {MAX_ROWS}"
    return None


def plan_for(
    q: Float[Array, "B T N H"],
    pages: KVPages,
    table_pages: int,
    window: int | None,
    terms: ScoreTerms,
) -> Plan:
    """Returns the plan of a call for the chip that is compiled for.

    Args:
      q, pages, window, terms: of the call.
      table_pages: pages of a sequence in the table.
    """
    _, kv_heads, page_size, width = pages.key.shape
    itemsize = pages.key.dtype.itemsize
    _, queries, num_heads, _ = q.shape
    group = num_heads // kv_heads
    # Rows fill whole tiles of fast memory: of bfloat16, tiles of 16 rows.
    tile_rows = SUBLANES * 4 // q.dtype.itemsize
    height = round_up(queries * group, tile_rows)

    heads = _heads_of_program(kv_heads, page_size, width, height, itemsize)
    page_bytes = _page_bytes(page_size, width, itemsize)
    fitting_pages = BUFFERS // (heads * page_bytes)
    pages_of_block = BLOCK // page_size
    block_pages = min(table_pages, pages_of_block, fitting_pages)
    given = tuple(name for name in ("alibi", "sinks") if getattr(terms, name) is not None)
    return Plan(
        queries=queries,
        group=group,
        height=height,
        heads=heads,
        unrolled=math.gcd(heads, UNROLLED),
        page_size=page_size,
        block_pages=max(1, block_pages),
        window=window,
        softcap=terms.softcap,
        scale=terms.scale,
        given=given,
        quantized=pages.quantized,
    )


def _page_bytes(page_size: int, width: int, itemsize: int) -> int:
    """Returns what a page of a head takes of fast memory: keys and values, in two slots."""
    lanes = round_up(width, LANES)
    return 4 * page_size * lanes * itemsize


def _heads_of_program(kv_heads: int, page_size: int, width: int, height: int, itemsize: int) -> int:
    """Returns how many key/value heads one program computes: the largest divisor that fits."""
    # Two cores need two programs.
    most = kv_heads
    if chip() in TWO_CORES and kv_heads % 2 == 0:
        most = kv_heads // 2

    page_bytes = _page_bytes(page_size, width, itemsize)
    # Maxima and denominators of a lane each, and float32 sums, queries and result.
    columns = 2 * LANES + 3 * width
    sum_bytes = 4 * height * columns
    fitting = min(BUFFERS // page_bytes, SUMS // sum_bytes)
    for heads in range(min(most, fitting), 1, -1):
        if kv_heads % heads == 0:
            return heads
    return 1


def decode_attention(
    q: Float[Array, "B T N H"],
    pages: KVPages,
    table: Int[Array, "B pages_per_sequence"],
    lengths: Int[Array, "B"],
    window: int | None,
    terms: ScoreTerms,
) -> Float[Array, "B T N H"]:
    """Decode attention page by page; see the API of the package for the equation."""
    plan = plan_for(q, pages, table.shape[1], window, terms)
    return paged_attention(q, pages, table, lengths, terms, plan, False)


def paged_attention(
    q: Float[Array, "B T N H"],
    pages: KVPages,
    table: Int[Array, "B pages_per_sequence"],
    lengths: Int[Array, "B"],
    terms: ScoreTerms,
    plan: Plan,
    interpret: Any,
) -> Float[Array, "B T N H"]:
    """Decode attention by a given plan.

    Args:
      q, pages, table, lengths, terms: as in the API.
      plan: block sizes and rules.
      interpret: what `pallas_call` takes by that name; False compiles.
    """
    rows = plan.queries * plan.group
    # [B, T, N, H] -> [B, K, GT, H], with the rows padded to whole tiles
    row_padding = ((0, 0), (0, 0), (0, plan.height - rows), (0, 0))
    q_rows = fold(q, pages.kv_heads)
    q_rows = jnp.pad(q_rows, row_padding)

    # One number per query head, [N] -> [K, GT] -> [1, K, GT, 1]
    columns = []
    for name in plan.given:
        by_row = per_row(getattr(terms, name), pages.kv_heads, plan.queries)
        columns.append(by_row[None, :, :, None])

    stored = pages.arrays()
    scalars = prefetched(lengths, plan)
    call = pl.pallas_call(
        functools.partial(kernel, plan),
        out_shape=jax.ShapeDtypeStruct(q_rows.shape, q.dtype),
        grid_spec=_grid(plan, table.shape, pages.kv_heads, len(scalars), stored),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="tessera_decode_attention",
        interpret=interpret,
    )
    # The table comes twice: one view is of this sequence's row, the other of the next one's.
    tables = (table[:, None], table[:, None])
    padded_columns = (jnp.pad(x, row_padding) for x in columns)
    out = call(*scalars, *tables, q_rows, *padded_columns, *stored)
    out = out[:, :, :rows]
    return unfold(out, plan.queries)


def prefetched(lengths: Int[Array, "B"], plan: Plan) -> list[Int[Array, "B"]]:
    """Returns what a program must know of every sequence.

    Its length, its first page and the one past its last, the blocks of all sequences before it, and
    the next sequence that has any.
    """
    batch = lengths.shape[0]
    first, end = page_range(lengths, plan.queries, plan.page_size, plan.window)
    # Blocks [2, 0, 1]: before [0, 2, 2], next sequence [2, 2, 3]
    pages = end - first
    blocks = (pages + plan.block_pages - 1) // plan.block_pages
    up_to = jnp.cumsum(blocks)
    before = up_to - blocks

    # Sequences with blocks [0, 3, 2] -> after the first one [3, 2], then 3 for none -> [2, 2, 3]
    sequence = jnp.arange(batch)
    with_blocks = jnp.where(blocks > 0, sequence, batch)
    after_first = jnp.append(with_blocks[1:], batch)
    following = jax.lax.cummin(after_first, reverse=True)
    scalars = (lengths, first, end, before, following)
    return [x.astype(jnp.int32) for x in scalars]


def _grid(
    plan: Plan, table: tuple[int, int], kv_heads: int, scalars: int, stored: Sequence[Array]
) -> pltpu.PrefetchScalarGridSpec:
    """Returns a program for each sequence and block of heads, and its views of the arrays.

    Args:
      plan: of the call.
      table: its shape.
      kv_heads: K.
      scalars: how many arrays `prefetched` returns; the last one names the next sequence.
      stored: the arrays of the pages, which stay in HBM.
    """
    batch, table_pages = table
    width = stored[0].shape[3]

    def table_row(sequence_of: Callable[..., Any]) -> pl.BlockSpec:
        def index(head_block: Any, sequence: Any, *scalars: Any) -> tuple[Any, int, int]:
            return sequence_of(sequence, scalars[-1]), 0, 0

        return pl.BlockSpec((1, 1, table_pages), index, memory_space=pltpu.SMEM)

    def own(sequence: Any, following: Any) -> Any:
        return sequence

    def next_one(sequence: Any, following: Any) -> Any:
        return jnp.minimum(following[sequence], batch - 1)

    # [B, K, GT, H] and [1, K, GT, 1]: the heads of a program
    rows = pl.BlockSpec(
        (1, plan.heads, plan.height, width), lambda head_block, row, *_: (row, head_block, 0, 0)
    )
    column = pl.BlockSpec(
        (1, plan.heads, plan.height, 1), lambda head_block, row, *_: (0, head_block, 0, 0)
    )
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)
    columns = [column] * len(plan.given)
    pages = [in_hbm] * len(stored)

    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=scalars,
        grid=(kv_heads // plan.heads, batch),
        in_specs=[table_row(own), table_row(next_one), rows, *columns, *pages],
        out_specs=rows,
        scratch_shapes=_scratch(plan, kv_heads, stored),
    )


def _scratch(plan: Plan, kv_heads: int, stored: Sequence[Array]) -> list[Any]:
    """Returns the buffers of the pages, the semaphores of their slots, and the sums."""
    width = stored[0].shape[3]
    # Two slots for a block of keys or values, 4 axes, or of scales, 3 axes.
    slots = {4: (2, plan.heads, plan.block, width), 3: (2, kv_heads, plan.block)}
    buffers = [pltpu.VMEM(slots[x.ndim], x.dtype) for x in stored]
    semaphores = pltpu.SemaphoreType.DMA((2,))

    # Maxima and denominators, repeated over lanes, and weighted values.
    by_lane = pltpu.VMEM((plan.heads, plan.height, LANES), jnp.float32)
    by_column = pltpu.VMEM((plan.heads, plan.height, width), jnp.float32)
    return [*buffers, semaphores, by_lane, by_lane, by_column]

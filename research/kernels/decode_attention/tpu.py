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
from research.kernels.decode_attention.pages import KVPages, page_range
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
    unit = LANES if pages.quantized else SUBLANES
    if page_size % unit or page_size > MAX_PAGE:
        nearest = min(round_up(page_size, unit), MAX_PAGE)
        return (
            f"page_size = {page_size} in {dtype}: it takes multiples of {unit}, such as {nearest}"
        )
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
        return f"{rows} query rows a key/value head: it takes at most {MAX_ROWS}"
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
    kv_heads, page_size, width = pages.key.shape[1:]
    queries = q.shape[1]
    group = q.shape[2] // kv_heads
    # Rows fill whole tiles of fast memory.
    height = round_up(queries * group, SUBLANES * 4 // q.dtype.itemsize)

    heads = _heads_of_program(kv_heads, page_size, width, height, pages.key.dtype.itemsize)
    fitting_pages = BUFFERS // (heads * _page_bytes(page_size, width, pages.key.dtype.itemsize))
    block_pages = min(table_pages, BLOCK // page_size, fitting_pages)
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
        given=tuple(name for name in ("alibi", "sinks") if getattr(terms, name) is not None),
        quantized=pages.quantized,
    )


def _page_bytes(page_size: int, width: int, itemsize: int) -> int:
    """Returns what a page of a head takes of fast memory: keys and values, in two slots."""
    return 4 * page_size * round_up(width, LANES) * itemsize


def _heads_of_program(kv_heads: int, page_size: int, width: int, height: int, itemsize: int) -> int:
    """Returns how many key/value heads one program computes: the largest divisor that fits."""
    # Two cores need two programs.
    halved = chip() in TWO_CORES and kv_heads % 2 == 0
    most = kv_heads // 2 if halved else kv_heads

    page_bytes = _page_bytes(page_size, width, itemsize)
    # Maxima and denominators of a lane each, and float32 sums, queries and result.
    sum_bytes = 4 * height * (2 * LANES + 3 * width)
    for heads in range(most, 1, -1):
        fits = heads * page_bytes <= BUFFERS and heads * sum_bytes <= SUMS
        if kv_heads % heads == 0 and fits:
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
    q_rows = jnp.pad(fold(q, pages.kv_heads), row_padding)

    # A number a query head, [N] -> [1, K, GT, 1]
    by_head = [getattr(terms, name) for name in plan.given]
    columns = [per_row(x, pages.kv_heads, plan.queries)[None, :, :, None] for x in by_head]
    stored = pages.arrays()
    scalars = _scalars(lengths, plan)
    call = pl.pallas_call(
        functools.partial(kernel, plan),
        out_shape=jax.ShapeDtypeStruct(q_rows.shape, q.dtype),
        grid_spec=_grid(plan, table.shape, pages.kv_heads, len(scalars), stored),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="tessera_decode_attention",
        interpret=interpret,
    )
    tables = (table[:, None], table[:, None])
    padded_columns = (jnp.pad(x, row_padding) for x in columns)
    out = call(*scalars, *tables, q_rows, *padded_columns, *stored)
    return unfold(out[:, :, :rows], plan.queries)


def _scalars(lengths: Int[Array, "B"], plan: Plan) -> list[Int[Array, "B"]]:
    """Returns what a program must know of every sequence.

    Its length, its first page and the one past its last, the blocks of all sequences before it, and
    the next sequence that has any.
    """
    batch = lengths.shape[0]
    first, end = page_range(lengths, plan.queries, plan.page_size, plan.window)
    # Blocks [2, 0, 1]: before [0, 2, 2], next sequence [2, 2, 3]
    blocks = (end - first + plan.block_pages - 1) // plan.block_pages
    before = jnp.cumsum(blocks) - blocks
    with_blocks = jnp.where(blocks > 0, jnp.arange(batch), batch)
    following = jax.lax.cummin(jnp.append(with_blocks[1:], batch), reverse=True)
    return [x.astype(jnp.int32) for x in (lengths, first, end, before, following)]


def _grid(
    plan: Plan, table: tuple[int, int], kv_heads: int, scalars: int, stored: Sequence[Array]
) -> pltpu.PrefetchScalarGridSpec:
    """Returns a program for each sequence and block of heads, and its views of the arrays.

    Args:
      plan: of the call.
      table: its shape.
      kv_heads: K.
      scalars: how many arrays `_scalars` returns; the last one names the next sequence.
      stored: the arrays of the pages, which stay in HBM.
    """
    batch, table_pages = table
    width = stored[0].shape[3]

    def table_row(sequence_of: Callable[..., Any]) -> pl.BlockSpec:
        def index(head_block: Any, sequence: Any, *scalars: Any) -> tuple[Any, int, int]:
            return sequence_of(sequence, scalars[-1]), 0, 0

        return pl.BlockSpec((1, 1, table_pages), index, memory_space=pltpu.SMEM)

    own_row = table_row(lambda sequence, following: sequence)
    next_row = table_row(lambda sequence, following: jnp.minimum(following[sequence], batch - 1))

    # [B, K, GT, H] and [1, K, GT, 1]: the heads of a program
    rows = pl.BlockSpec(
        (1, plan.heads, plan.height, width), lambda head_block, row, *_: (row, head_block, 0, 0)
    )
    column = pl.BlockSpec(
        (1, plan.heads, plan.height, 1), lambda head_block, row, *_: (0, head_block, 0, 0)
    )
    in_hbm = pl.BlockSpec(memory_space=pltpu.HBM)

    # Two slots for a block of keys or values, 4 axes, or of scales, 3 axes.
    slots = {4: (2, plan.heads, plan.block, width), 3: (2, kv_heads, plan.block)}
    buffers = [pltpu.VMEM(slots[x.ndim], x.dtype) for x in stored]
    # Maxima, denominators, and weighted values.
    sums = [
        pltpu.VMEM((plan.heads, plan.height, columns), jnp.float32)
        for columns in (LANES, LANES, width)
    ]
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=scalars,
        grid=(kv_heads // plan.heads, batch),
        in_specs=[own_row, next_row, rows, *[column] * len(plan.given), *[in_hbm] * len(stored)],
        out_specs=rows,
        scratch_shapes=[*buffers, pltpu.SemaphoreType.DMA((2,)), *sums],
    )

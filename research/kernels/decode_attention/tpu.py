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
from research.kernels.decode_attention.pages import KVPages, needed
from research.kernels.decode_attention.rows import by_row, fold, unfold
from research.kernels.decode_attention.tpu_kernel import LANES, SUBLANES, Plan, kernel
from research.kernels.rounding import round_up
from research.parallel.target import chip, platform

# Tokens of a block; bytes that both halves of its buffers may take of a core's fast memory, and
# those of the sums.
BLOCK = 512
BUFFERS, SUMS = 8 * 2**20, 4 * 2**20
MAX_PAGE = 2048
# Query rows of a key/value head: what a matmul takes at a time, twice.
MAX_ROWS = 256
# Chips whose two cores share one memory and one program.
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")
# Heads that are computed beside each other.
UNROLLED = 4


def unsupported_reason(
    q: Float[Array, "B R N H"], pages: KVPages, window: int | None, terms: ScoreTerms
) -> str | None:
    """Returns the rule that a call breaks, with the nearest value that it allows."""
    kv_heads, size, width = pages.key.shape[1:]
    rows, unit = q.shape[1] * q.shape[2] // kv_heads, LANES if pages.quantized else SUBLANES
    if platform() != "tpu":
        return f"{platform()}: it needs a TPU"
    for name, dtype in (("queries", q.dtype), ("pages", pages.key.dtype)):
        if dtype == jnp.float16:
            return f"{name} in float16: it takes them in bfloat16 or float32"
    # Rows of memory that are not full lie in another order, and all pages would be copied at every
    # call.
    if width % LANES:
        return (
            f"pages of head_dim = {width}: it takes multiples of {LANES}, such as "
            f"{round_up(width, LANES)}, with zeros"
        )
    if size % unit or size > MAX_PAGE:
        nearest = min(round_up(size, unit), MAX_PAGE)
        return (
            f"page_size = {size} in {pages.key.dtype.name}: it takes multiples of {unit}, such "
            f"as {nearest}"
        )
    # So it is with rows of scales.
    if pages.quantized and kv_heads not in (1, 2, 4) and kv_heads % SUBLANES:
        nearest = round_up(kv_heads, 4 if kv_heads < 4 else SUBLANES)
        return (
            f"num_kv_heads = {kv_heads} in {pages.key.dtype.name}: it takes 1, 2, 4 or "
            f"multiples of 8, as {nearest}"
        )
    if rows > MAX_ROWS:
        return f"{rows} query rows a key/value head: it takes at most {MAX_ROWS}"
    return None


def plan_for(
    q: Float[Array, "B R N H"], pages: KVPages, places: int, window: int | None, terms: ScoreTerms
) -> Plan:
    """Returns the plan of a call for the chip that is compiled for.

    Args:
      q, pages, window, terms: of the call.
      places: pages of a sequence in the table.
    """
    kv_heads, size, width = pages.key.shape[1:]
    group = q.shape[2] // kv_heads
    # Rows fill whole tiles of fast memory.
    height = round_up(q.shape[1] * group, SUBLANES * 4 // q.dtype.itemsize)
    a_page = 4 * size * round_up(width, LANES) * pages.key.dtype.itemsize
    a_sum = 4 * height * (2 * LANES + 3 * width)
    most = kv_heads // 2 if chip() in TWO_CORES and kv_heads % 2 == 0 else kv_heads
    fitting = (
        n
        for n in range(most, 1, -1)
        if not kv_heads % n and n * a_page <= BUFFERS and n * a_sum <= SUMS
    )
    heads = next(fitting, 1)
    return Plan(
        rows=q.shape[1],
        group=group,
        height=height,
        heads=heads,
        unrolled=math.gcd(heads, UNROLLED),
        page_size=size,
        block_pages=max(1, min(places, BLOCK // size, BUFFERS // (heads * a_page))),
        window=window,
        softcap=terms.softcap,
        scale=terms.scale,
        given=tuple(name for name in ("alibi", "sinks") if getattr(terms, name) is not None),
        quantized=pages.quantized,
    )


def decode_attention(
    q: Float[Array, "B R N H"],
    pages: KVPages,
    table: Int[Array, "B pages_per_sequence"],
    lengths: Int[Array, "B"],
    window: int | None,
    terms: ScoreTerms,
) -> Float[Array, "B R N H"]:
    """Decode attention page by page; see the API of the package for the equation."""
    plan = plan_for(q, pages, table.shape[1], window, terms)
    return paged_attention(q, pages, table, lengths, terms, plan, False)


def paged_attention(
    q: Float[Array, "B R N H"],
    pages: KVPages,
    table: Int[Array, "B pages_per_sequence"],
    lengths: Int[Array, "B"],
    terms: ScoreTerms,
    plan: Plan,
    interpret: Any,
) -> Float[Array, "B R N H"]:
    """Decode attention by a given plan.

    Args:
      q, pages, table, lengths, terms: as in the API.
      plan: block sizes and rules.
      interpret: what `pallas_call` takes by that name; False compiles.
    """
    kv_heads, count = pages.kv_heads, plan.rows * plan.group
    grown = ((0, 0), (0, 0), (0, plan.height - count), (0, 0))
    folded = jnp.pad(fold(q, kv_heads), grown)
    columns = [
        by_row(getattr(terms, name), kv_heads, plan.rows)[None, :, :, None] for name in plan.given
    ]
    stored = [
        x for x in (pages.key, pages.value, pages.key_scale, pages.value_scale) if x is not None
    ]
    walk = _walk(lengths, plan)
    out = pl.pallas_call(
        functools.partial(kernel, plan),
        out_shape=jax.ShapeDtypeStruct(folded.shape, q.dtype),
        grid_spec=_grid(plan, table.shape, kv_heads, len(walk), stored),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name="tessera_decode_attention",
        interpret=interpret,
    )(*walk, table[:, None], table[:, None], folded, *(jnp.pad(x, grown) for x in columns), *stored)
    return unfold(out[:, :, :count], plan.rows)


def _walk(lengths: Int[Array, "B"], plan: Plan) -> list[Int[Array, "B"]]:
    """Returns what each program must know of its sequence.

    Its length, its first page and the one past its last, the blocks of all sequences before it, and
    the next sequence that has any.
    """
    batch = lengths.shape[0]
    first, end = needed(lengths, plan.rows, plan.page_size, plan.window)
    blocks = (end - first + plan.block_pages - 1) // plan.block_pages
    before = jnp.cumsum(blocks) - blocks
    busy = jnp.where(blocks > 0, jnp.arange(batch), batch)
    following = jax.lax.cummin(jnp.append(busy[1:], batch), reverse=True)
    return [x.astype(jnp.int32) for x in (lengths, first, end, before, following)]


def _grid(
    plan: Plan, table: tuple[int, int], kv_heads: int, walk: int, stored: Sequence[Array]
) -> pltpu.PrefetchScalarGridSpec:
    """Returns a program for each sequence and part of the heads, and what it finds in fast memory.

    Args:
      plan: of the call.
      table: its shape.
      kv_heads: K.
      walk: arrays that say what a program walks; the last one names the next sequence.
      stored: the arrays of the pages, which stay where they are.
    """
    (batch, places), width = table, stored[0].shape[3]

    def table_row(of: Callable[..., Any]) -> pl.BlockSpec:
        return pl.BlockSpec(
            (1, 1, places), lambda part, row, *s: (of(row, s[-1]), 0, 0), memory_space=pltpu.SMEM
        )

    rows = pl.BlockSpec(
        (1, plan.heads, plan.height, width), lambda part, row, *_: (row, part, 0, 0)
    )
    column = pl.BlockSpec((1, plan.heads, plan.height, 1), lambda part, row, *_: (0, part, 0, 0))
    halves = {4: (2, plan.heads, plan.block, width), 3: (2, kv_heads, plan.block)}
    return pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=walk,
        grid=(kv_heads // plan.heads, batch),
        in_specs=[
            table_row(lambda row, following: row),
            table_row(lambda row, following: jnp.minimum(following[row], batch - 1)),
            rows,
            *(column for _ in plan.given),
            *(pl.BlockSpec(memory_space=pltpu.HBM) for _ in stored),
        ],
        out_specs=rows,
        scratch_shapes=[
            *(pltpu.VMEM(halves[x.ndim], x.dtype) for x in stored),
            pltpu.SemaphoreType.DMA((2,)),
            *(
                pltpu.VMEM((plan.heads, plan.height, across), jnp.float32)
                for across in (LANES, LANES, width)
            ),
        ],
    )

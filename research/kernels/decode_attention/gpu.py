"""Decode attention for Hopper GPUs: a Pallas kernel over splits of sequences, and one that combines
them.

Sequences are cut into splits of about the same length, and into so many that every processor has
some however few and however ragged the sequences are. The length of a split depends on the lengths
of the sequences, at run time; only the greatest number of splits is static. The splits of a
sequence are combined by their largest scores and their denominators.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

# Not public before JAX 0.11.
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jaxtyping import Array, Float, Int

from research.kernels.attention import ScoreTerms
from research.kernels.decode_attention.gpu_combine import BAND, combine_kernel
from research.kernels.decode_attention.gpu_kernel import STEP, Plan, scratch, split_kernel
from research.kernels.decode_attention.pages import QUANTIZED, KVPages, page_range
from research.kernels.decode_attention.rows import fold, per_row, unfold
from research.kernels.rounding import round_up
from research.parallel.target import not_hopper, platform

# Head widths: whole swizzles of shared memory, up to what registers hold of the result.
WIDTH = 64
MAX_WIDTH = 256
# Rows of a key/value head that one block computes, in units of the matmul's columns.
MAX_ROWS = 64
COLUMNS = 8
# Tokens of the smallest page. Scales are 4 bytes per token, and are copied 128 bytes at a time.
LEAST_PAGE = 8
LEAST_QUANTIZED_PAGE = 32
# Blocks that run at once on one of an H200's processors, and how many processors it has.
BLOCKS = 3
PROCESSORS = 132
# Splits that each block computes, and steps that a split has at least.
ROUNDS = 2
LEAST_SPLIT = 2
# Bytes of a processor's shared memory, and bytes of it that each block needs for other things.
SHARED = 228 * 2**10
RESERVED = 4 * 2**10
# More steps in shared memory than this are no faster.
MAX_STAGES = 6
# Rows of all splits whose sums are loaded at a time when they are combined: what registers hold.
COMBINED = 128


def page_size_fault(page_size: int, dtype: str) -> str | None:
    """Returns why pages of a size are not taken, with the nearest that is."""
    least = LEAST_QUANTIZED_PAGE if dtype in QUANTIZED else LEAST_PAGE
    fitting = [size for size in (8, 16, 32) if size >= least]
    if page_size % STEP == 0 or page_size in fitting:
        return None
    sizes = f"{', '.join(map(str, fitting))} or multiples of {STEP}"
    larger = [size for size in fitting if size > page_size]
    nearest = larger[0] if larger else round_up(page_size, STEP)
    return f"in {dtype}: it takes {sizes}, such as {nearest}"


def unsupported_reason(
    q: Float[Array, "B T N H"], pages: KVPages, window: int | None, terms: ScoreTerms
) -> str | None:
    """Returns the rule that a call breaks, with the nearest value that it allows."""
    page_size, width = pages.key.shape[2:]
    dtype = pages.key.dtype.name
    reason = not_hopper()
    if reason is not None:
        return reason
    if q.dtype.name not in ("bfloat16", "float16"):
        return f"queries in {q.dtype.name}: it takes bfloat16 or float16"
    if not pages.quantized and dtype != q.dtype.name:
        return f"pages in {dtype}: it takes the queries' {q.dtype.name}, int8 or float8_e4m3fn"
    if width % WIDTH or width > MAX_WIDTH:
        nearest = min(round_up(width, WIDTH), MAX_WIDTH)
        return (
            f"pages of head_dim = {width}: it takes multiples of {WIDTH} up to {MAX_WIDTH}, "
            f"such as {nearest}"
        )

    fault = page_size_fault(page_size, dtype)
    return None if fault is None else f"page_size = {page_size} {fault}"


def plan_for(
    q: Float[Array, "B T N H"],
    pages: KVPages,
    table_pages: int,
    window: int | None,
    terms: ScoreTerms,
) -> Plan:
    """Returns the plan of a call.

    Args:
      q, pages, window, terms: of the call.
      table_pages: pages of a sequence in the table.
    """
    _, kv_heads, page_size, width = pages.key.shape
    _, queries, heads, _ = q.shape
    # 75 rows -> 2 tiles of 38 rows -> of 40 rows, whole columns of the matmul
    rows = queries * heads // kv_heads
    tiles = -(-rows // MAX_ROWS)
    tile_rows = -(-rows // tiles)
    height = round_up(tile_rows, COLUMNS)

    given = () if terms.alibi is None else ("alibi",)
    largest = QUANTIZED[pages.key.dtype.name] if pages.quantized else None
    most_steps = _most_steps(page_size, table_pages)
    most_splits = -(-most_steps // LEAST_SPLIT)
    together = min(COMBINED // height, most_splits)
    return Plan(
        queries=queries,
        tiles=tiles,
        height=height,
        page_size=page_size,
        stages=_stages(height, width, pages),
        together=max(1, together),
        window=window,
        softcap=terms.softcap,
        scale=float(terms.scale),
        given=given,
        largest=largest,
        interpret=platform() != "gpu",
    )


def _most_steps(page_size: int, table_pages: int) -> int:
    """Returns the steps of a sequence that fills its table."""
    return -(-table_pages * page_size // STEP)


def _stages(height: int, width: int, pages: KVPages) -> int:
    """Returns how many steps shared memory holds so that as many blocks as possible run at once."""
    itemsize = pages.key.dtype.itemsize
    scale_bytes = 4 if pages.quantized else 0
    # Keys and values of a step; queries and weights in two bytes; 8-bit values widened.
    step_bytes = 2 * STEP * (width * itemsize + scale_bytes)
    widened = STEP * width if pages.quantized else 0
    fixed_bytes = 2 * (height * (width + STEP) + widened)

    for blocks in range(BLOCKS, 0, -1):
        bytes_of_block = SHARED // blocks - RESERVED
        stages = (bytes_of_block - fixed_bytes) // step_bytes
        if stages >= 2:
            return min(MAX_STAGES, stages)
    raise AssertionError("two steps of the widest head fit into shared memory")


def decode_attention(
    q: Float[Array, "B T N H"],
    pages: KVPages,
    table: Int[Array, "B pages_per_sequence"],
    lengths: Int[Array, "B"],
    window: int | None,
    terms: ScoreTerms,
) -> Float[Array, "B T N H"]:
    """Decode attention split by split; see the API of the package for the equation.

    On another platform than a GPU it runs in JAX's interpreter of GPU kernels, for tests.
    """
    batch, table_pages = table.shape
    plan = plan_for(q, pages, table_pages, window, terms)
    kv_heads = pages.kv_heads
    width = pages.head_dim
    q_rows = fold(q, kv_heads)
    rows = q_rows.shape[2]
    heads = kv_heads * plan.tiles

    first_page, _ = page_range(lengths, plan.queries, plan.copied, window)
    starts = first_page * plan.copied
    # Over all heads there are ROUNDS splits for every block that can run at once.
    target = -(-ROUNDS * BLOCKS * PROCESSORS // heads)
    most_steps = _most_steps(plan.page_size, table_pages)
    splits, ranges = split_sequences(lengths, starts, most_steps, target)
    num_splits = len(splits)
    alibi = _of_rows(plan, terms.alibi, kv_heads)
    stored = pages.arrays()

    # Of each split: out [H, height], and the maxima and denominators [2, height]
    split_shape = (num_splits, heads, width, plan.height)
    sums_shape = (num_splits, heads, 2, plan.height)
    launch_splits = _launch(
        plan,
        split_kernel,
        [split_shape, sums_shape],
        jnp.float32,
        {"head": heads, "split": num_splits},
        scratch(plan, width, q.dtype, pages.key.dtype),
    )
    q_tiles = _tiles(plan, q_rows)
    sums = launch_splits(splits, table, q_tiles, *alibi, *stored)

    sinks = _of_rows(plan, terms.sinks, kv_heads)
    grid = {"band": width // BAND, "head": heads, "sequence": batch}
    out_shape = (batch, heads, width, plan.height)
    launch_combine = _launch(plan, combine_kernel, [out_shape], q.dtype, grid)
    (out,) = launch_combine(ranges, *sums, *sinks)

    # [B, K·tiles, H, height] -> [B, K·tiles, height, H] -> [B, K, rows and padding, H]
    by_tile = jnp.swapaxes(out, 2, 3)
    by_row = by_tile.reshape(batch, kv_heads, plan.tiles * plan.height, width)
    return unfold(by_row[:, :, :rows], plan.queries)


def _tiles(plan: Plan, x: Float[Array, "*batch K rows H"]) -> Float[Array, "*batch heads height H"]:
    """Returns rows cut into the tiles of the plan, each as a head of its own.

    With 2 tiles of 40: [B, K, 75, H] -> [B, K, 80, H] -> [B, 2K, 40, H].
    """
    *batch, kv_heads, rows, width = x.shape
    padding = plan.tiles * plan.height - rows
    no_padding = [(0, 0)] * len(batch)
    padded = jnp.pad(x, [*no_padding, (0, 0), (0, padding), (0, 0)])
    heads = kv_heads * plan.tiles
    return padded.reshape(*batch, heads, plan.height, width)


def _of_rows(
    plan: Plan, of_heads: Float[Array, "N"] | None, kv_heads: int
) -> list[Float[Array, "heads height"]]:
    """Returns a number of each query head as one of each row, in tiles; nothing for None."""
    if of_heads is None:
        return []
    # [N] -> [K, rows, 1] -> [heads, height]
    of_rows = per_row(of_heads, kv_heads, plan.queries)
    tiles = _tiles(plan, of_rows[..., None])
    return [tiles[..., 0]]


def _launch(
    plan: Plan,
    kernel: Callable[..., None],
    shapes: list[tuple[int, ...]],
    dtype: Any,
    grid: dict[str, int],
    shared: dict[str, Any] | None = None,
) -> Callable[..., list[Array]]:
    """Returns a kernel on a grid of named axes, the fastest first."""
    named_kernel = functools.partial(kernel, plan)
    named_kernel.__name__ = f"decode_attention_{kernel.__name__}"  # what profilers show
    # Of a kernel's grid the last axis is the fastest.
    names = tuple(reversed(grid))
    sizes = tuple(grid[name] for name in names)
    out_type = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    interpret = InterpretGPUParams() if plan.interpret else None
    return plgpu.kernel(
        named_kernel,
        out_type=out_type,
        scratch_types=shared or {},
        grid=sizes,
        grid_names=names,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )


def split_sequences(
    lengths: Int[Array, "B"], starts: Int[Array, "B"], most_steps: int, target: int
) -> tuple[Int[Array, "splits 4"], Int[Array, "B 2"]]:
    """Returns the splits of all sequences, and the range of them that each sequence has.

    A split is (sequence, first token, steps, length of the sequence). All splits have about as many
    steps, whatever the lengths of the sequences are. Unused rows have 0 steps.

    Args:
      lengths: tokens of each sequence.
      starts: the first token of each that any row attends to, or one before it in the same copy.
      most_steps: steps of a sequence that fills its table.
      target: splits to aim at.
    """
    batch = lengths.shape[0]
    steps = (lengths - starts + STEP - 1) // STEP
    all_steps = jnp.sum(steps)
    even_steps = (all_steps + target - 1) // target
    split_steps = jnp.maximum(LEAST_SPLIT, even_steps)

    # Steps [5, 2] in splits of 3 steps: splits [2, 1], firsts [0, 2], ends [2, 3]
    splits = (steps + split_steps - 1) // split_steps
    ends = jnp.cumsum(splits)
    firsts = ends - splits
    ranges = jnp.stack([firsts, ends], axis=1)

    # Of each split the sequence [0, 0, 1], the steps before it [0, 3, 0], its own steps [3, 2, 2]
    most_splits = min(batch + target, batch * most_steps)
    index = jnp.arange(most_splits)
    is_past = ends[None] <= index[:, None]
    sequence = jnp.sum(is_past, axis=1)
    sequence = jnp.minimum(sequence, batch - 1)
    steps_before = (index - firsts[sequence]) * split_steps
    steps_left = steps[sequence] - steps_before
    its_steps = jnp.minimum(steps_left, split_steps)
    is_used = index < ends[-1]
    its_steps = jnp.where(is_used, its_steps, 0)

    first_token = starts[sequence] + steps_before * STEP
    length = lengths[sequence]
    rows = jnp.stack([sequence, first_token, its_steps, length], axis=1)
    return rows.astype(jnp.int32), ranges.astype(jnp.int32)

"""Decode attention for Hopper GPUs: a Pallas kernel over parts of sequences, and one that joins
them.

Sequences are cut into parts of about the same length, so many that all processors have some however
few and however ragged the sequences are. How long a part is depends on the lengths, when they are
known; only how many parts there may be is fixed when it is compiled. The parts are joined by their
greatest scores and denominators.
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
from research.kernels.decode_attention.gpu_kernel import (
    BAND,
    STEP,
    Plan,
    join_kernel,
    part_kernel,
    scratch,
)
from research.kernels.decode_attention.pages import QUANTIZED, KVPages, needed
from research.kernels.decode_attention.rows import by_row, fold, unfold
from research.kernels.rounding import round_up
from research.parallel.target import not_hopper, platform

# Head widths: whole swizzles of shared memory, up to what registers hold of the result.
WIDTH, MAX_WIDTH = 64, 256
# Rows of a key/value head that are computed together, in units of the matmul's columns.
MAX_ROWS, COLUMNS = 64, 8
# Pages of 8-bit numbers come with scales of 4 bytes a token, which are copied 128 bytes at a time.
LEAST_PAGE, LEAST_QUANTIZED_PAGE = 8, 32
# Blocks that may lie on one of an H200's 132 processors; parts that each of them computes, of at
# least so many steps.
BLOCKS, PROCESSORS, ROUNDS, LEAST_SHARE = 3, 132, 2, 2
# Bytes of a processor's shared memory, and those of each block that are not spoken of here; steps,
# of which more than so many hide nothing more.
SHARED, RESERVED, MAX_STAGES = 228 * 2**10, 4 * 2**10, 6
# Rows of all parts whose sums are loaded at a time when they are joined: what registers hold.
JOINED = 128


def unsupported_reason(
    q: Float[Array, "B R N H"], pages: KVPages, window: int | None, terms: ScoreTerms
) -> str | None:
    """Returns the rule that a call breaks, with the nearest value that it allows."""
    size, width = pages.key.shape[2:]
    if (reason := not_hopper()) is not None:
        return reason
    if q.dtype.name not in ("bfloat16", "float16"):
        return f"queries in {q.dtype.name}: it takes bfloat16 or float16"
    if not pages.quantized and pages.key.dtype != q.dtype:
        return (
            f"pages in {pages.key.dtype.name}: it takes the queries' {q.dtype.name}, int8 or "
            "float8_e4m3fn"
        )
    if width % WIDTH or width > MAX_WIDTH:
        nearest = min(round_up(width, WIDTH), MAX_WIDTH)
        return (
            f"pages of head_dim = {width}: it takes multiples of {WIDTH} up to {MAX_WIDTH}, "
            f"such as {nearest}"
        )
    fitting = [
        n for n in (8, 16, 32) if n >= (LEAST_QUANTIZED_PAGE if pages.quantized else LEAST_PAGE)
    ]
    if size % STEP and size not in fitting:
        sizes = f"{', '.join(map(str, fitting))} or multiples of {STEP}"
        nearest = next((n for n in fitting if n > size), round_up(size, STEP))
        return f"page_size = {size} in {pages.key.dtype.name}: it takes {sizes}, such as {nearest}"
    return None


def plan_for(
    q: Float[Array, "B R N H"], pages: KVPages, places: int, window: int | None, terms: ScoreTerms
) -> Plan:
    """Returns the plan of a call.

    Args:
      q, pages, window, terms: of the call.
      places: pages of a sequence in the table.
    """
    _, kv_heads, size, width = pages.key.shape
    count = q.shape[1] * q.shape[2] // kv_heads
    tiles = -(-count // MAX_ROWS)
    height = round_up(-(-count // tiles), COLUMNS)
    return Plan(
        rows=q.shape[1],
        tiles=tiles,
        height=height,
        page_size=size,
        stages=_stages(height, width, pages),
        together=max(1, min(JOINED // height, -(-_most(size, places) // LEAST_SHARE))),
        window=window,
        softcap=terms.softcap,
        scale=float(terms.scale),
        given=("alibi",) if terms.alibi is not None else (),
        largest=QUANTIZED[pages.key.dtype.name] if pages.quantized else None,
        interpret=platform() != "gpu",
    )


def _most(page_size: int, places: int) -> int:
    """Returns the steps of a sequence that fills its table."""
    return -(-places * page_size // STEP)


def _stages(height: int, width: int, pages: KVPages) -> int:
    """Returns how many steps a block holds so that as many blocks as may be lie beside each
    other.
    """
    scale = 4 if pages.quantized else 0
    step = 2 * STEP * (width * pages.key.dtype.itemsize + scale)
    own = 2 * (height * (width + STEP) + (STEP * width if pages.quantized else 0))
    fitting = ((SHARED // blocks - RESERVED - own) // step for blocks in range(BLOCKS, 0, -1))
    return min(MAX_STAGES, next(stages for stages in fitting if stages >= 2))


def decode_attention(
    q: Float[Array, "B R N H"],
    pages: KVPages,
    table: Int[Array, "B pages_per_sequence"],
    lengths: Int[Array, "B"],
    window: int | None,
    terms: ScoreTerms,
) -> Float[Array, "B R N H"]:
    """Decode attention part by part; see the API of the package for the equation.

    On another platform than a GPU it runs in JAX's interpreter of GPU kernels, for tests.
    """
    batch, places = table.shape
    plan = plan_for(q, pages, places, window, terms)
    kv_heads, width = pages.kv_heads, pages.head_dim
    count, heads = q.shape[1] * q.shape[2] // kv_heads, kv_heads * plan.tiles

    def pieces(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0),) * (x.ndim - 2) + ((0, plan.tiles * plan.height - count), (0, 0)))
        return x.reshape(*x.shape[:-3], heads, plan.height, x.shape[-1])

    def numbers(x: Array) -> Array:
        return pieces(by_row(x, kv_heads, plan.rows)[..., None])[..., 0]

    starts = needed(lengths, plan.rows, plan.copied, window)[0] * plan.copied
    target = -(-ROUNDS * BLOCKS * PROCESSORS // heads)
    work, spans = shares(lengths, starts, _most(plan.page_size, places), target)
    extras = [numbers(terms.alibi)] if terms.alibi is not None else []
    stored = [
        x for x in (pages.key, pages.value, pages.key_scale, pages.value_scale) if x is not None
    ]
    sums = _launch(
        plan,
        part_kernel,
        [(len(work), heads, width, plan.height), (len(work), heads, 2, plan.height)],
        jnp.float32,
        {"head": heads, "part": len(work)},
        scratch(plan, width, q.dtype, pages.key.dtype),
    )(work, table, pieces(fold(q, kv_heads)), *extras, *stored)
    sinks = [numbers(terms.sinks)] if terms.sinks is not None else []
    grid = {"band": width // BAND, "head": heads, "sequence": batch}
    (out,) = _launch(plan, join_kernel, [(batch, heads, width, plan.height)], q.dtype, grid)(
        spans, *sums, *sinks
    )
    out = jnp.swapaxes(out, 2, 3).reshape(batch, kv_heads, plan.tiles * plan.height, width)
    return unfold(out[:, :, :count], plan.rows)


def _launch(
    plan: Plan,
    kernel: Callable[..., None],
    shapes: list[tuple[int, ...]],
    dtype: Any,
    grid: dict[str, int],
    shared: dict[str, Any] | None = None,
) -> Callable[..., list[Array]]:
    """Returns a kernel of `gpu_kernel`, for a grid of the axes of these names, the fastest
    first.
    """
    body = functools.partial(kernel, plan)
    body.__name__ = f"decode_attention_{kernel.__name__}"  # what profilers show
    names = tuple(reversed(grid))  # Of a kernel's grid the last axis is the fastest.
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(shape, dtype) for shape in shapes],
        scratch_types=shared or {},
        grid=tuple(grid[name] for name in names),
        grid_names=names,
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=InterpretGPUParams() if plan.interpret else None,
    )


def shares(
    lengths: Int[Array, "B"], starts: Int[Array, "B"], most: int, target: int
) -> tuple[Int[Array, "parts 4"], Int[Array, "B 2"]]:
    """Returns the parts that sequences are cut into, and which of them are those of each sequence.

    A part is its sequence, its first token, its steps and the length of the sequence. All are about
    as long, whatever the lengths of the sequences are; those of a sequence follow each other.
    Places without a part have 0 steps.

    Args:
      lengths: tokens of each sequence.
      starts: the first token of each that any row sees, or one before it in the same copy.
      most: steps of a sequence that fills its table.
      target: parts to aim at.
    """
    batch = lengths.shape[0]
    steps = (lengths - starts + STEP - 1) // STEP
    share = jnp.maximum(LEAST_SHARE, (jnp.sum(steps) + target - 1) // target)
    parts = (steps + share - 1) // share
    ends = jnp.cumsum(parts)
    places = jnp.arange(min(batch + target, batch * most))
    row = jnp.minimum(jnp.sum(ends[None] <= places[:, None], axis=1), batch - 1)
    done = (places - (ends - parts)[row]) * share
    mine = jnp.where(places < ends[-1], jnp.minimum(steps[row] - done, share), 0)
    work = jnp.stack([row, starts[row] + done * STEP, mine, lengths[row]], axis=1)
    return work.astype(jnp.int32), jnp.stack([ends - parts, ends], axis=1).astype(jnp.int32)

"""The gradient of the bias on TPU: every tile of scores once more, summed over the axes that the
bias broadcasts.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from research.kernels.attention.mask import AttentionMask
from research.kernels.attention.terms import ScoreTerms
from research.kernels.attention.tpu_backward import load, tile_gradients
from research.kernels.attention.tpu_forward import VMEM_LIMIT
from research.kernels.attention.tpu_operands import Operands, gather
from research.kernels.attention.tpu_plan import Blocks, cover, visibility
from research.kernels.attention.tpu_tile import LANES, Rules, side


def bias_gradient(
    q: Float[Array, "B N T H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    g: Float[Array, "B N T H"],
    log_total: Float[Array, "B N 1 T"],
    delta: Float[Array, "B N 1 T"],
    mask: AttentionMask,
    terms: ScoreTerms,
    blocks: Blocks,
    interpret: Any,
) -> Float[Array, "..."]:
    """Returns the gradient of the bias in its own shape, summed in float32; nothing larger is
    held.
    """
    batch, heads, queries, width = q.shape
    keys, group = k.shape[2], heads // k.shape[1]
    sizes = (batch, heads, cover(queries, blocks.queries), cover(keys, blocks.keys))
    shape = terms.bias.shape
    # Axes that are summed over come last, so that a block of the result is finished before the next
    # one.
    order = sorted(range(4), key=lambda axis: shape[axis] == 1)
    axes = [order.index(axis) for axis in range(4)]
    operands = Operands.of(mask, terms, axes)
    for name, array in (("q", q), ("g", g)):
        operands.add(name, array, (1, 1, blocks.queries, width), lambda b, n, i, j: (b, n, i, 0))
    for name, array in (("log_total", log_total), ("delta", delta)):
        operands.add(name, array, (1, 1, 1, blocks.queries), lambda b, n, i, j: (b, n, 0, i))
    for name, array in (("k", k), ("v", v)):
        operands.add(
            name,
            array,
            (1, 1, blocks.keys, width),
            lambda b, n, i, j: (b, jax.lax.div(n, group), j, 0),
        )
    operands.add_tokens("q", blocks.queries, lambda b, n, i, j: i)
    operands.add_tokens("kv", blocks.keys, lambda b, n, i, j: j)
    operands.add_bias(blocks.queries, blocks.keys, lambda b, n, i, j: (b, n, i, j))
    spec = operands.specs[operands.names.index("bias")]
    some, _ = visibility(mask, queries, keys, blocks)
    rules = Rules.of(mask, terms, queries, keys)
    broadcast = tuple(size == 1 for size in shape)
    kernel = functools.partial(
        _kernel, rules, blocks, axes, broadcast, some.shape[0], operands.names
    )
    return pl.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct(shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=tuple(sizes[axis] for axis in order),
            in_specs=operands.specs,
            out_specs=spec,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 4, vmem_limit_bytes=VMEM_LIMIT
        ),
        name="tessera_attention_bias",
        interpret=interpret,
    )(some.astype(jnp.int32).reshape(-1), *operands.arrays).astype(terms.bias.dtype)


def _kernel(
    rules: Rules,
    blocks: Blocks,
    axes: Sequence[int],
    broadcast: tuple[bool, ...],
    rows: int,
    names: tuple[str, ...],
    some: Any,
    *rest: Any,
) -> None:
    *inputs, out_ref = rest
    indices = [pl.program_id(axis) for axis in axes]
    batch, head, i, j = indices
    refs = gather(names, inputs, batch, head)
    visit = ((batch if rows > 1 else 0) * pl.num_programs(axes[2]) + i) * pl.num_programs(
        axes[3]
    ) + j

    sums = [at == 0 for at, summed in zip(indices, broadcast, strict=True) if summed]

    @pl.when(functools.reduce(jnp.logical_and, sums, True))
    def _start() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    @pl.when(some[visit] > 0)
    def _add() -> None:
        keys, start = side(refs, "kv", j * blocks.keys, 0, blocks.keys, axis=0), i * blocks.queries
        here = pl.ds(0, blocks.queries)
        operands = load(rules, refs, keys, start, here, True)
        _, _, gradient = tile_gradients(rules, refs, operands, keys, start, 0, here, True)
        if broadcast[2]:
            gradient = gradient.sum(axis=1, keepdims=True)
        if broadcast[3]:
            gradient = gradient.sum(axis=0, keepdims=True)
        out_ref[0, 0] += _transpose(gradient)


def _transpose(x: Float[Array, "R C"]) -> Float[Array, "C R"]:
    """Returns xᵀ, of a row or a column too."""
    rows, columns = x.shape
    wide = jnp.broadcast_to(x, (LANES if rows == 1 else rows, LANES if columns == 1 else columns))
    return wide.T[:columns, :rows]

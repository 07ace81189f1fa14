"""The sides of `tessera bench kernels`, each in a process of its own.

`python -m research.bench.kernels_sides time|temporaries KERNEL SIDE DTYPE SIZES…` serves rounds, or
prints the bytes of the compiled temporaries.
"""

import itertools
import math
import sys
from collections.abc import Callable
from typing import Any

from research.bench.sides import serve
from research.core import backend

if __name__ == "__main__":
    backend.configure()

# JAX reads the settings above when it starts.
import jax
import jax.numpy as jnp
import optax

from research.core.promotion import promoting
from research.kernels.cross_entropy import cross_entropy
from research.kernels.decode_attention import KVPages, decode_attention, gather
from research.kernels.grouped_matmul import grouped_matmul
from research.parallel.target import platform

PAGE = 64
# The function that is timed, and one that makes its arguments.
Side = tuple[Callable[..., Any], Callable[[], tuple[Any, ...]]]


def _normal(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    key = jax.random.key(seed)
    return jax.random.normal(key, shape, dtype)


def cross_entropy_side(side: str, dtype: str, tokens: int, width: int, vocabulary: int) -> Side:
    """Mean loss and gradients of hidden states and float32 kernel: `tessera`, or `plain` with all
    float32 logits.
    """

    def mean(nll: Any, log_z: Any) -> Any:
        return nll.sum() / tokens, None

    def ours(hidden: Any, kernel: Any, targets: Any) -> Any:
        loss, _ = cross_entropy(mean, hidden, kernel, targets)
        return loss

    def plain(hidden: Any, kernel: Any, targets: Any) -> Any:
        # [tokens, V] at once, in float32.
        kernel = kernel.astype(hidden.dtype)
        logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return nll.mean()

    def arguments() -> tuple[Any, ...]:
        hidden = _normal(0, (tokens, width), dtype)
        kernel = _normal(1, (width, vocabulary), "float32")
        kernel = kernel * width**-0.5
        key = jax.random.key(2)
        targets = jax.random.randint(key, (tokens,), 0, vocabulary)
        return hidden, kernel, targets

    loss = ours if side == "tessera" else plain
    step = jax.value_and_grad(loss, argnums=(0, 1))
    return step, arguments


def group_sizes(rows: int, experts: int) -> list[int]:
    """Returns rows of each expert, `rows` in all; the last expert has nearly twice its even share.

    12 rows of 3 experts are 2, 4 and 6.
    """
    # Expert i ends after i (i + 1) / 2 of experts (experts + 1) / 2 parts.
    parts = experts * (experts + 1)
    ends = [rows * i * (i + 1) // parts for i in range(experts + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]


def grouped_matmul_side(
    side: str, dtype: str, rows: int, width: int, features: int, experts: int
) -> Side:
    """Product and gradients of rows and kernels: `tessera`, or `ragged_dot` of JAX."""
    product = grouped_matmul if side == "tessera" else jax.lax.ragged_dot

    def step(x: Any, kernels: Any, sizes: Any, g: Any) -> Any:
        def of_floats(x: Any, kernels: Any) -> Any:
            return product(x, kernels, sizes)

        y, pull_back = jax.vjp(of_floats, x, kernels)
        return y, pull_back(g)

    def arguments() -> tuple[Any, ...]:
        x = _normal(0, (rows, width), dtype)
        kernels = _normal(1, (experts, width, features), dtype)
        sizes = group_sizes(rows, experts)
        sizes = jnp.asarray(sizes, jnp.int32)
        g = _normal(2, (rows, features), dtype)
        return x, kernels, sizes, g

    return step, arguments


def sequence_lengths(batch: int, length: int) -> list[int]:
    """Returns tokens of each sequence, from the longest down to half of it."""
    # 3 sequences of at most 100 tokens -> [100, 84, 67]
    half = length // 2
    return [length - half * i // batch for i in range(batch)]


def page_bytes(dtype: str, batch: int, length: int, kv_heads: int, head_width: int) -> int:
    """Returns the bytes of keys and values in all pages that the sequences fill or begin."""
    pages = 0
    for tokens in sequence_lengths(batch, length):
        # 100 tokens begin the second page of 64.
        pages += math.ceil(tokens / PAGE)
    values_a_token = 2 * kv_heads * head_width
    values = pages * PAGE * values_a_token
    return values * jnp.dtype(dtype).itemsize


def decode_attention_side(
    side: str, dtype: str, batch: int, length: int, heads: int, kv_heads: int, head_width: int
) -> Side:
    """One new token a sequence: `tessera` over scattered pages, `jax.nn` over a dense cache, or a
    `copy` of the same size.
    """
    lengths = sequence_lengths(batch, length)
    lengths = jnp.asarray(lengths, jnp.int32)
    pages_a_row = math.ceil(length / PAGE)

    def paged() -> tuple[Any, ...]:
        q = _normal(0, (batch, 1, heads, head_width), dtype)
        num_pages = batch * pages_a_row
        shape = (num_pages, kv_heads, PAGE, head_width)
        k = _normal(1, shape, dtype)
        v = _normal(2, shape, dtype)
        pages = KVPages(k, v)
        # The pages of a sequence lie anywhere in the pool: [pages] -> [B, pages of a row].
        key = jax.random.key(3)
        order = jax.random.permutation(key, num_pages)
        table = order.reshape(batch, pages_a_row)
        return q, pages, table, lengths

    def dense() -> tuple[Any, ...]:
        # The same keys and values, each sequence in one row: [B, S, K, H].
        q, pages, table, _ = paged()
        k, v = gather(pages, table)
        # Whole pages may have more tokens than a row.
        k = k[:, :length]
        v = v[:, :length]
        return q, k, v, lengths

    def plain(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        # cuDNN has no float32 attention.
        implementation = "xla"
        if platform() == "gpu" and dtype == "bfloat16":
            implementation = "cudnn"
        attention = promoting(jax.nn.dot_product_attention)
        return attention(q, k, v, key_value_seq_lengths=lengths, implementation=implementation)

    def cache() -> tuple[Any, ...]:
        size = page_bytes(dtype, batch, length, kv_heads, head_width)
        values = jnp.zeros(size // 4, jnp.float32)
        return (values,)

    def copy(x: Any) -> Any:
        # Reads and writes every value; a plain copy would be left out.
        return x + 1

    sides = {
        "tessera": (decode_attention, paged),
        "jax.nn": (plain, dense),
        "copy": (copy, cache),
    }
    return sides[side]


BUILDERS = {
    "cross_entropy": cross_entropy_side,
    "grouped_matmul": grouped_matmul_side,
    "decode_attention": decode_attention_side,
}


def main(action: str, kernel: str, side: str, dtype: str, *sizes: str) -> None:
    """Serves rounds of a side until its input ends, or prints its temporaries."""
    build = BUILDERS[kernel]
    function, arguments = build(side, dtype, *map(int, sizes))
    step = jax.jit(function)
    if action == "temporaries":
        shapes = jax.eval_shape(arguments)
        compiled = step.lower(*shapes).compile()
        memory = compiled.memory_analysis()
        print(memory.temp_size_in_bytes)
        return

    make_operands = jax.jit(arguments)
    operands = make_operands()

    def one_round() -> None:
        result = step(*operands)
        jax.block_until_ready(result)

    serve(one_round)


if __name__ == "__main__":
    main(*sys.argv[1:])

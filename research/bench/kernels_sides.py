"""The sides of `tessera bench kernels`, each in a process of its own.

`python -m research.bench.kernels_sides time|temporaries KERNEL SIDE DTYPE SIZES…` serves rounds, or
prints the bytes of the compiled temporaries.
"""

import itertools
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
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def cross_entropy_side(side: str, dtype: str, tokens: int, width: int, vocabulary: int) -> Side:
    """Mean loss and gradients of hidden states and float32 kernel: `tessera`, or `plain` with all
    float32 logits.
    """

    def mean(nll: Any, log_z: Any) -> Any:
        return nll.sum() / tokens, None

    def ours(hidden: Any, kernel: Any, targets: Any) -> Any:
        return cross_entropy(mean, hidden, kernel, targets)[0]

    def plain(hidden: Any, kernel: Any, targets: Any) -> Any:
        # [tokens, V] at once, in float32.
        kernel = kernel.astype(hidden.dtype)
        logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    def arguments() -> tuple[Any, ...]:
        hidden = _normal(0, (tokens, width), dtype)
        kernel = _normal(1, (width, vocabulary), "float32") * width**-0.5
        targets = jax.random.randint(jax.random.key(2), (tokens,), 0, vocabulary)
        return hidden, kernel, targets

    loss = ours if side == "tessera" else plain
    return jax.value_and_grad(loss, argnums=(0, 1)), arguments


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
        sizes = jnp.asarray(group_sizes(rows, experts), jnp.int32)
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
    lengths = sequence_lengths(batch, length)
    pages = sum(-(-tokens // PAGE) for tokens in lengths)
    values_a_token = 2 * kv_heads * head_width
    return pages * PAGE * values_a_token * jnp.dtype(dtype).itemsize


def decode_attention_side(
    side: str, dtype: str, batch: int, length: int, heads: int, kv_heads: int, head_width: int
) -> Side:
    """One new token a sequence: `tessera` over scattered pages, `jax.nn` over a dense cache, or a
    `copy` of the same size.
    """
    lengths = jnp.asarray(sequence_lengths(batch, length), jnp.int32)
    pages_a_row = -(-length // PAGE)

    def paged() -> tuple[Any, ...]:
        q = _normal(0, (batch, 1, heads, head_width), dtype)
        shape = (batch * pages_a_row, kv_heads, PAGE, head_width)
        k = _normal(1, shape, dtype)
        v = _normal(2, shape, dtype)
        # The pages of a sequence lie anywhere in the pool: [pages] -> [B, pages of a row].
        order = jax.random.permutation(jax.random.key(3), shape[0])
        table = order.reshape(batch, pages_a_row)
        return q, KVPages(k, v), table, lengths

    def dense() -> tuple[Any, ...]:
        # The same keys and values, each sequence in one row: [B, S, K, H].
        q, pages, table, _ = paged()
        k, v = gather(pages, table)
        return q, k[:, :length], v[:, :length], lengths

    def plain(q: Any, k: Any, v: Any, lengths: Any) -> Any:
        # cuDNN has no float32 attention.
        has_cudnn = platform() == "gpu" and dtype == "bfloat16"
        implementation = "cudnn" if has_cudnn else "xla"
        attention = promoting(jax.nn.dot_product_attention)
        return attention(q, k, v, key_value_seq_lengths=lengths, implementation=implementation)

    def cache() -> tuple[Any, ...]:
        size = page_bytes(dtype, batch, length, kv_heads, head_width)
        return (jnp.zeros(size // 4, jnp.float32),)

    sides = {
        "tessera": (decode_attention, paged),
        "jax.nn": (plain, dense),
        "copy": (lambda x: x + 1, cache),
    }
    return sides[side]


BUILDERS = {
    "cross_entropy": cross_entropy_side,
    "grouped_matmul": grouped_matmul_side,
    "decode_attention": decode_attention_side,
}


def main(action: str, kernel: str, side: str, dtype: str, *sizes: str) -> None:
    """Serves rounds of a side until its input ends, or prints its temporaries."""
    function, arguments = BUILDERS[kernel](side, dtype, *map(int, sizes))
    step = jax.jit(function)
    if action == "temporaries":
        compiled = step.lower(*jax.eval_shape(arguments)).compile()
        print(compiled.memory_analysis().temp_size_in_bytes)
        return
    operands = jax.jit(arguments)()
    serve(lambda: jax.block_until_ready(step(*operands)))


if __name__ == "__main__":
    main(*sys.argv[1:])

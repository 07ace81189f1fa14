"""What the implementations of cross-entropy share: chunk sizes, loops over chunks, the parts of a
tile, the mesh.

A tile is a chunk of tokens times a chunk of vocabulary entries, which are columns of the kernel.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Shaped

from research.kernels.row_major import row_major, swap_last
from research.parallel.mesh_axes import BATCH_AXES, CONTEXT_AXIS, TENSOR_AXIS
from research.parallel.row_gradients import width_axes_of
from research.parallel.shard_map import shard_map, sharding_axes
from research.parallel.target import platform

# The most float32 logits of a tile. On CPU they stay in its caches; elsewhere computing a tile must
# take longer than reading the kernel and adding to both gradients.
CPU_TILE_ELEMENTS = 2**22
TILE_ELEMENTS = 2**24
# The most vocabulary entries of a tile, by default.
MAX_VOCAB_CHUNK = 2**12
# Default chunks of a vocabulary that is cut are multiples of this, the minor tile size of a TPU
# array; default chunks of tokens are at least this.
LANES = 128
# Loops of at most this many chunks are unrolled on CPU, where the body of a loop runs slowly.
MAX_UNROLLED = 8


@dataclasses.dataclass(frozen=True)
class CrossEntropyConfig:
    """The static arguments of `cross_entropy`, with its defaults filled in."""

    softcap: float | None
    label_smoothing: float
    token_chunk: int
    vocab_chunk: int
    # In which the kernel's gradient is summed over devices.
    kernel_gradient_dtype: str = "float32"


def vocab_shard_size(vocab_size: int) -> int:
    """Returns how many columns of the kernel each device has under the mesh in context."""
    axes = sharding_axes((TENSOR_AXIS,), vocab_size)
    if not axes:
        return vocab_size
    mesh = jax.sharding.get_abstract_mesh()
    return vocab_size // mesh.shape[TENSOR_AXIS]


def default_vocab_chunk(vocab_size: int) -> int:
    """Returns the columns of a tile for a device that has `vocab_size`: even chunks in multiples of
    `LANES`, of at most `MAX_VOCAB_CHUNK`.
    """
    chunks = -(-vocab_size // MAX_VOCAB_CHUNK)
    if chunks == 1:
        return vocab_size

    # 10,000 columns -> 3 chunks -> 3,334 columns -> 27 groups of 128 lanes, 3,456 columns
    lane_groups = -(-vocab_size // (chunks * LANES))
    return lane_groups * LANES


def default_token_chunk(vocab_chunk: int) -> int:
    """Returns the tokens of a tile of `vocab_chunk` columns."""
    elements = CPU_TILE_ELEMENTS if platform() == "cpu" else TILE_ELEMENTS
    return max(LANES, elements // vocab_chunk)


def split_tokens(
    x: Shaped[Array, "tokens *rest"], token_chunk: int
) -> Shaped[Array, "chunks chunk *rest"]:
    """Returns `x` in even chunks of at most `token_chunk` tokens, the last one padded with
    zeros.
    """
    # 10 tokens in chunks of 4: [10, D] -> [12, D] -> [3, 4, D]. 9 tokens fill 3 chunks of 3:
    # [9, D] -> [3, 3, D].
    tokens, *rest = x.shape
    chunks = -(-tokens // token_chunk)
    padding = -tokens % chunks
    no_padding = [(0, 0)] * len(rest)
    padded = jnp.pad(x, [(0, padding), *no_padding])
    return padded.reshape(chunks, -1, *rest)


def join_tokens(
    x: Shaped[Array, "chunks chunk *rest"], tokens: int
) -> Shaped[Array, "tokens *rest"]:
    """Returns the inverse of `split_tokens`: chunks joined, without the padding."""
    # 10 tokens in chunks of 4: [3, 4, D] -> [12, D] -> [10, D]
    _, _, *rest = x.shape
    padded = x.reshape(-1, *rest)
    return padded[:tokens]


def fold_tokens(
    body: Callable[..., Any], total: Any, state: Any, arrays: tuple[Array, ...], unroll_limit: int
) -> Any:
    """Runs `total, state[i] = body(total, state[i], *[x[i] for x in arrays])` for every chunk i of
    tokens, as a `fori_loop`; returns (total, state).

    Args:
      body: computes one chunk.
      total: a tree that every chunk adds to.
      state: a tree of arrays with a leading axis of chunks, updated in place.
      arrays: inputs with a leading axis of chunks.
      unroll_limit: unroll the loop if it has at most this many chunks.
    """
    chunks = arrays[0].shape[0]

    def step(i: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        def take(x: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)

        def put(x: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_index_in_dim(x, new, i, axis=0)

        # [chunks, chunk, ...] -> chunk i, [chunk, ...]
        total, state = carry
        state_i = jax.tree.map(take, state)
        arrays_i = [take(x) for x in arrays]
        total, state_i = body(total, state_i, *arrays_i)
        state = jax.tree.map(put, state, state_i)
        return total, state

    unroll = chunks <= unroll_limit
    return jax.lax.fori_loop(0, chunks, step, (total, state), unroll=unroll)


def fold_vocabulary(
    body: Callable[[Any, Any, int], Any], carry: Any, num_columns: int, vocab_chunk: int
) -> Any:
    """Runs `carry = body(carry, start, size)` for every chunk of columns; the last may be narrower.

    It is a `fori_loop` and never unrolled: unrolled, XLA for CPU computes the logits of many tiles
    before it uses those of the first.
    """
    # 10 columns in chunks of 4: tiles (start, size) = (0, 4), (4, 4), (8, 2)
    full, rest = divmod(num_columns, vocab_chunk)

    def full_tile(i: Any, carry: Any) -> Any:
        start = i * vocab_chunk
        return body(carry, start, vocab_chunk)

    if full == 1:
        carry = full_tile(0, carry)
    elif full:
        carry = jax.lax.fori_loop(0, full, full_tile, carry)

    if rest:
        start = full * vocab_chunk
        carry = body(carry, start, rest)
    return carry


def max_unrolled(num_columns: int, vocab_chunk: int) -> int:
    """Returns the most chunks of tokens whose loop is unrolled."""
    one_tile_wide = num_columns <= vocab_chunk
    if platform() == "cpu" and one_tile_wide:
        return MAX_UNROLLED
    return 1


def per_device(
    function: Callable[..., Any],
    kernel: Float[Array, "D V"],
    *arrays: Array,
    has_kernel_output: bool,
) -> Any:
    """Calls a function in a `shard_map` over the tokens and the columns of the kernel.

    Args:
      function: takes (batch axes, tensor axes, kernel, *arrays), the mesh axes that shard tokens
        and columns, and a device's shards; returns arrays over tokens, which it has already
        reduced over the tensor axes.
      kernel: the output embedding.
      *arrays: arrays over tokens, the hidden states first.
      has_kernel_output: whether `function` returns (arrays over tokens, an array like the
        kernel), which `row_gradients.sum_over_tokens` has summed.
    """
    tokens = arrays[0].shape[0]
    vocab_size = kernel.shape[1]
    batch_axes = sharding_axes((*BATCH_AXES, CONTEXT_AXIS), tokens)
    tensor_axes = sharding_axes((TENSOR_AXIS,), vocab_size)
    on_shard = functools.partial(function, batch_axes, tensor_axes)
    axes = (*batch_axes, *tensor_axes)
    if not axes:
        return on_shard(kernel, *arrays)
    if batch_axes:
        # Where devices have parts of its width, they gather what the products take.
        kernel = kernel.astype(arrays[0].dtype)

    # A kernel [D, V] by columns, arrays [tokens, ...] by tokens.
    kernel_spec = PartitionSpec(None, tensor_axes or None)
    token_spec = PartitionSpec(batch_axes or None)
    array_specs = [token_spec] * len(arrays)
    in_specs = (kernel_spec, *array_specs)
    out_specs: Any = token_spec
    if has_kernel_output:
        width_axes = width_axes_of(batch_axes, kernel.shape[0])
        out_specs = (token_spec, PartitionSpec(width_axes or None, tensor_axes or None))
    mapped = shard_map(on_shard, in_specs, out_specs, axes=axes)
    return mapped(kernel, *arrays)


def local_targets(
    targets: Int[Array, "tokens"], tensor_axes: tuple[str, ...], num_columns: int
) -> Int[Array, "tokens"]:
    """Returns targets as columns of this device's shard of the kernel.

    Targets of other shards are below 0 or at least `num_columns`: `is_target` is False for them.
    """
    if not tensor_axes:
        return targets
    # 8 columns on each of 2 devices: targets [3, 9] -> [3, 9] on the first, [-5, 1] on the second
    shard = jax.lax.axis_index(tensor_axes)
    return targets - shard * num_columns


def take_columns(
    kernel: Float[Array, "D V"], start: Any, size: int, dtype: Any
) -> Float[Array, "D columns"]:
    """Returns some columns of the kernel, cast to `dtype`."""
    kernel_part = jax.lax.dynamic_slice_in_dim(kernel, start, size, axis=1)
    # `astype` alone would be hoisted out of the loop, and all of the kernel rounded before it.
    finfo = jnp.finfo(dtype)
    rounded = jax.lax.reduce_precision(kernel_part, finfo.nexp, finfo.nmant)
    return rounded.astype(dtype)


def make_logits(
    hidden: Float[Array, "chunk D"], kernel_part: Float[Array, "D columns"], softcap: float | None
) -> Float[Array, "chunk columns"]:
    """Returns the logits of a tile."""
    logits = jnp.dot(hidden, kernel_part, preferred_element_type=jnp.float32)
    if softcap is None:
        return logits
    bounded = jnp.tanh(logits / softcap)
    return softcap * bounded


def is_target(targets: Int[Array, "chunk"], start: Any, size: int) -> Bool[Array, "chunk columns"]:
    """Returns the one-hot targets of a tile whose first column is `start`."""
    # targets [5, 8], start 4, size 3 -> [[0 1 0] [0 0 0]]
    index = jnp.arange(size)
    ids = start + index[None]
    return targets[:, None] == ids


def logit_gradients(
    config: CrossEntropyConfig,
    vocab_size: int,
    logits: Float[Array, "chunk columns"],
    one_hot: Bool[Array, "chunk columns"],
    log_z: Float[Array, "chunk"],
    g_nll: Float[Array, "chunk"],
    g_log_z: Float[Array, "chunk"],
    dtype: Any,
) -> Float[Array, "chunk columns"]:
    """Returns the gradient of a tile of logits before the cap, cast to `dtype`.

    dz = softmax(z) (g_nll + g_log_z) - label · g_nll,   times 1 - (z / cap)² of the soft cap
    """
    # V = 4, ε = 0.2: labels of a target are 0.85, of the other entries 0.05.
    epsilon = config.label_smoothing
    uniform = epsilon / vocab_size
    of_target = jnp.where(one_hot, 1 - epsilon, 0.0)
    labels = of_target + uniform
    probabilities = jnp.exp(logits - log_z[:, None])
    # nll contains log_z, so log_z receives both cotangents.
    g_log_z_total = g_nll + g_log_z
    from_log_z = probabilities * g_log_z_total[:, None]
    from_labels = labels * g_nll[:, None]
    dlogits = from_log_z - from_labels
    if config.softcap is not None:
        bounded = logits / config.softcap
        dlogits *= 1 - jnp.square(bounded)

    # The barrier keeps both matmuls that read it from computing it again.
    dlogits = dlogits.astype(dtype)
    return jax.lax.optimization_barrier(dlogits)


def hidden_gradients(
    dlogits: Float[Array, "chunk columns"], kernel_part: Float[Array, "D columns"]
) -> Float[Array, "chunk D"]:
    """Returns what a tile adds to the gradient of the hidden states, in float32."""
    return jnp.einsum("cv,dv->cd", dlogits, kernel_part, preferred_element_type=jnp.float32)


def column_gradients(
    hidden: Float[Array, "chunk D"], dlogits: Float[Array, "chunk columns"]
) -> Float[Array, "D columns"]:
    """Returns what a tile adds to the gradient of its columns of the kernel, in float32."""
    # Row-major operands keep XLA for CPU on its matmul library: [D, chunk] times [chunk, columns]
    hidden_transposed = swap_last(hidden)
    dkernel_part = jnp.dot(hidden_transposed, dlogits, preferred_element_type=jnp.float32)
    return row_major(dkernel_part)

"""What all implementations of cross-entropy in chunks share: what is computed, sizes of tiles,
loops over them, the mesh.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from research.parallel.mesh_axes import BATCH_AXES, TENSOR_AXIS
from research.parallel.shard_map import shard_map, sharding_axes
from research.parallel.target import platform

# float32 logits of a tile, and vocabulary entries in it. On CPU they stay in its caches; elsewhere
# a tile must outweigh reading the kernel and adding to both gradients.
CPU_TILE_ELEMENTS, TILE_ELEMENTS, TILE_VOCABULARY = 2**22, 2**24, 2**12
# Entries of a row that lie together on every backend.
LANES = 128
# Loops up to this many chunks are written out on CPU, where a loop's body runs slowly.
MAX_UNROLLED = 8


@dataclasses.dataclass(frozen=True)
class Terms:
    """What the loss is, and the tile it is taken in; the API says what each means."""

    softcap: float | None
    label_smoothing: float
    token_chunk: int
    vocab_chunk: int


def vocabulary_share(vocab_size: int) -> int:
    """Returns how many columns of the kernel each device has under the mesh in context."""
    axes = sharding_axes((TENSOR_AXIS,), vocab_size)
    return vocab_size // jax.sharding.get_abstract_mesh().shape[TENSOR_AXIS] if axes else vocab_size


def default_vocab_chunk(vocab_size: int) -> int:
    """Returns how many of a device's `vocab_size` columns go into a tile: even parts, none over
    `TILE_VOCABULARY`.
    """
    parts = -(-vocab_size // TILE_VOCABULARY)
    return vocab_size if parts == 1 else -(-vocab_size // (parts * LANES)) * LANES


def default_token_chunk(vocab_chunk: int) -> int:
    """Returns how many tokens of a device's share of the batch go into a tile of so many
    columns.
    """
    return max(LANES, (CPU_TILE_ELEMENTS if platform() == "cpu" else TILE_ELEMENTS) // vocab_chunk)


def in_chunks(x: Array, chunk: int) -> Array:
    """Returns `x` cut into even chunks of its first axis, the last one filled up with zeros."""
    count = -(-x.shape[0] // chunk)
    pad = -x.shape[0] % count
    return jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))).reshape(count, -1, *x.shape[1:])


def joined(x: Array, tokens: int) -> Array:
    """Returns chunks of tokens put together again, without what they were filled up with."""
    return x.reshape(-1, *x.shape[2:])[:tokens]


def fold_tokens(
    tile: Callable[..., Any], total: Any, state: Any, arrays: tuple[Array, ...], unrolled: int
) -> Any:
    """Folds `total, state[i] = tile(total, state[i], *arrays[i])` over chunks i of tokens; the
    state stays in place.
    """
    count = arrays[0].shape[0]

    def step(i: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        total, state = carry
        mine, *here = jax.tree.map(
            lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), (state, *arrays)
        )
        total, mine = tile(total, mine, *here)
        return total, jax.tree.map(
            lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, axis=0), state, mine
        )

    return jax.lax.fori_loop(0, count, step, (total, state), unroll=count <= unrolled)


def over_vocabulary(
    tile: Callable[[Any, Any, int], Any], carry: Any, columns: int, chunk: int
) -> Any:
    """Folds `tile(carry, first column, size)` over the columns; the last tile may be narrower.

    The loop keeps tiles apart in time: written out, XLA for CPU makes many of them before it uses
        the first.
    """
    full, rest = divmod(columns, chunk)
    if full == 1:
        carry = tile(carry, 0, chunk)
    elif full:
        carry = jax.lax.fori_loop(0, full, lambda i, c: tile(c, i * chunk, chunk), carry)
    return tile(carry, full * chunk, rest) if rest else carry


def unrolled_chunks(columns: int, chunk: int) -> int:
    """Returns up to how many chunks of tokens are written out."""
    return MAX_UNROLLED if platform() == "cpu" and columns <= chunk else 1


def per_device(
    share: Callable[..., Any], kernel: Float[Array, "D V"], *arrays: Array, sums_kernel: bool
) -> Any:
    """Calls `share(batch axes, tensor axes, kernel, *arrays)` on each device's tokens and columns
    of the kernel.

    It returns arrays over tokens, and after them an array like the kernel if `sums_kernel`.
    """
    batch = sharding_axes(BATCH_AXES, arrays[0].shape[0])
    tensor = sharding_axes((TENSOR_AXIS,), kernel.shape[1])
    share = functools.partial(share, batch, tensor)
    if not batch + tensor:
        return share(kernel, *arrays)
    columns, tokens = PartitionSpec(None, tensor or None), PartitionSpec(batch or None)
    in_specs = (columns, *(tokens,) * len(arrays))
    out_specs = (tokens, columns) if sums_kernel else tokens
    return shard_map(share, in_specs, out_specs, axes=(*batch, *tensor))(kernel, *arrays)


def local_targets(
    targets: Int[Array, "M"], tensor: tuple[str, ...], columns: int
) -> Int[Array, "M"]:
    """Returns targets counted from the device's first column; those of other devices lie outside of
    its own.
    """
    return targets - jax.lax.axis_index(tensor) * columns if tensor else targets


def take_columns(
    kernel: Float[Array, "D V"], start: Any, size: int, dtype: Any
) -> Float[Array, "D P"]:
    """Returns some columns of the kernel, rounded to a type."""
    part = jax.lax.dynamic_slice_in_dim(kernel, start, size, axis=1)
    # A mere conversion compilers move out of the loop, and round all of the kernel before it.
    return jax.lax.reduce_precision(part, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant).astype(
        dtype
    )


def make_logits(
    hidden: Float[Array, "C D"], columns: Float[Array, "D P"], softcap: float | None
) -> Float[Array, "C P"]:
    """Returns the logits of some tokens and columns."""
    logits = jnp.dot(hidden, columns, preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def is_target(targets: Int[Array, "C"], start: Any, size: int) -> Bool[Array, "C P"]:
    """Returns where a column is the target of a token."""
    return targets[:, None] == start + jnp.arange(size)[None]


def logit_gradients(
    terms: Terms,
    vocab_size: int,
    logits: Float[Array, "C P"],
    hits: Bool[Array, "C P"],
    log_z: Float[Array, "C"],
    g_nll: Float[Array, "C"],
    g_log_z: Float[Array, "C"],
    dtype: Any,
) -> Float[Array, "C P"]:
    """Returns the gradient of the products of hidden states and columns, from those of both
    results.
    """
    wanted = jnp.where(hits, 1 - terms.label_smoothing, 0.0) + terms.label_smoothing / vocab_size
    dlogits = (
        jnp.exp(logits - log_z[:, None]) * (g_nll + g_log_z)[:, None] - wanted * g_nll[:, None]
    )
    if terms.softcap is not None:
        dlogits *= 1 - jnp.square(logits / terms.softcap)
    return jax.lax.optimization_barrier(dlogits.astype(dtype))

"""Cross-entropy a tile of tokens by vocabulary at a time: logits are made, used and forgotten, twice.

The backward pass makes the logits again: their gradient needs the weight of each token, which only then is known.
Under a mesh each device has its share of the tokens and its columns of the kernel, which never leave it: devices send
each other a few numbers a token forward, and backward the gradient of the hidden states; the gradients of the kernel
meet after the last tile.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from research.core.mesh_axes import BATCH_AXES, TENSOR_AXIS
from research.kernels.mesh import shared_axes
from research.kernels.row_major import row_major, swap_last
from research.kernels.target import platform

# float32 logits of a tile, and vocabulary entries in it. On CPU they stay in its caches; elsewhere a tile must outweigh
# reading the kernel and adding to both gradients.
CPU_TILE_ELEMENTS, TILE_ELEMENTS, TILE_VOCABULARY = 2**22, 2**24, 2**12
# Entries of a row that lie together on every backend.
LANES = 128
# Loops up to this many chunks are written out on CPU, where a loop's body runs slowly.
MAX_UNROLLED = 8


@dataclasses.dataclass(frozen=True)
class Terms:
    """What the loss is, and the tile it is taken in; the face says what each means."""

    softcap: float | None
    label_smoothing: float
    token_chunk: int
    vocab_chunk: int


def vocabulary_share(vocab_size: int) -> int:
    """Returns how many columns of the kernel each device has under the mesh in context."""
    axes = shared_axes((TENSOR_AXIS,), vocab_size)
    return vocab_size // jax.sharding.get_abstract_mesh().shape[TENSOR_AXIS] if axes else vocab_size


def default_vocab_chunk(vocab_size: int) -> int:
    """Returns how many of a device's `vocab_size` columns go into a tile: even parts, none over `TILE_VOCABULARY`."""
    parts = -(-vocab_size // TILE_VOCABULARY)
    return vocab_size if parts == 1 else -(-vocab_size // (parts * LANES)) * LANES


def default_token_chunk(vocab_chunk: int) -> int:
    """Returns how many tokens of a device's share of the batch go into a tile of so many columns."""
    return max(LANES, (CPU_TILE_ELEMENTS if platform() == "cpu" else TILE_ELEMENTS) // vocab_chunk)


def _in_chunks(x: Array, chunk: int) -> Array:
    """Returns `x` cut into even chunks of its first axis, the last one filled up with zeros."""
    count = -(-x.shape[0] // chunk)
    pad = -x.shape[0] % count
    return jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))).reshape(count, -1, *x.shape[1:])


def _joined(x: Array, tokens: int) -> Array:
    return x.reshape(-1, *x.shape[2:])[:tokens]


def _over_tokens(tile: Callable[..., Any], total: Any, state: Any, arrays: tuple[Array, ...], unrolled: int) -> Any:
    """Folds `total, state[i] = tile(total, state[i], *arrays[i])` over chunks i of tokens; the state stays in place."""
    count = arrays[0].shape[0]

    def step(i: Any, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        total, state = carry
        mine, *here = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), (state, *arrays))
        total, mine = tile(total, mine, *here)
        return total, jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, axis=0), state, mine)

    return jax.lax.fori_loop(0, count, step, (total, state), unroll=count <= unrolled)


def _over_vocabulary(tile: Callable[[Any, Any, int], Any], carry: Any, columns: int, chunk: int) -> Any:
    """Folds `tile(carry, first column, size)` over the columns; the last tile may be narrower.

    The loop keeps tiles apart in time: written out, XLA for CPU makes many of them before it uses the first.
    """
    full, rest = divmod(columns, chunk)
    if full == 1:
        carry = tile(carry, 0, chunk)
    elif full:
        carry = jax.lax.fori_loop(0, full, lambda i, c: tile(c, i * chunk, chunk), carry)
    return tile(carry, full * chunk, rest) if rest else carry


def _unrolled(columns: int, chunk: int) -> int:
    """Returns up to how many chunks of tokens are written out."""
    return MAX_UNROLLED if platform() == "cpu" and columns <= chunk else 1


def _per_device(share: Callable[..., Any], kernel: Float[Array, "D V"], *arrays: Array, sums_kernel: bool) -> Any:
    """Calls `share(batch axes, tensor axes, kernel, *arrays)` on each device's tokens and columns of the kernel.

    It returns arrays over tokens, and after them an array like the kernel if `sums_kernel`.
    """
    batch = shared_axes(BATCH_AXES, arrays[0].shape[0])
    tensor = shared_axes((TENSOR_AXIS,), kernel.shape[1])
    share = functools.partial(share, batch, tensor)
    if not batch + tensor:
        return share(kernel, *arrays)
    columns, tokens = PartitionSpec(None, tensor or None), PartitionSpec(batch or None)
    specs = {
        "in_specs": (columns, *(tokens,) * len(arrays)),
        "out_specs": (tokens, columns) if sums_kernel else tokens,
    }
    # The other axes stay with the partitioner, which only compiled code has.
    return jax.jit(jax.shard_map(share, axis_names={*batch, *tensor}, check_vma=False, **specs))(kernel, *arrays)


def _local_targets(targets: Int[Array, "M"], tensor: tuple[str, ...], columns: int) -> Int[Array, "M"]:
    """Returns targets counted from the device's first column; those of other devices lie outside of its own."""
    return targets - jax.lax.axis_index(tensor) * columns if tensor else targets


def _columns(kernel: Float[Array, "D V"], start: Any, size: int, dtype: Any) -> Float[Array, "D P"]:
    part = jax.lax.dynamic_slice_in_dim(kernel, start, size, axis=1)
    # A mere conversion compilers move out of the loop, and round all of the kernel before it.
    return jax.lax.reduce_precision(part, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant).astype(dtype)


def _logits(hidden: Float[Array, "C D"], columns: Float[Array, "D P"], softcap: float | None) -> Float[Array, "C P"]:
    logits = jnp.dot(hidden, columns, preferred_element_type=jnp.float32)
    return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _is_target(targets: Int[Array, "C"], start: Any, size: int) -> Array:
    return targets[:, None] == start + jnp.arange(size)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def cross_entropy(
    hidden: Float[Array, "M D"], kernel: Float[Array, "D V"], targets: Int[Array, "M"], terms: Terms
) -> tuple[Float[Array, "M"], Float[Array, "M"]]:
    """Negative log-likelihood and log-partition of each token; the gradient of `kernel` is summed in float32."""
    vocab_size = kernel.shape[1]

    def share(_: Any, tensor: tuple[str, ...], kernel: Array, hidden: Array, targets: Array) -> tuple[Array, Array]:
        tokens, columns = hidden.shape[0], kernel.shape[1]
        arrays = (hidden, _local_targets(targets, tensor, columns))
        arrays = tuple(_in_chunks(x, terms.token_chunk) for x in arrays)

        def over_tokens(state: Any, start: Any, size: int) -> Any:
            part = _columns(kernel, start, size, hidden.dtype)

            def tile(_: None, state: tuple[Array, ...], hidden: Array, targets: Array) -> tuple[None, Any]:
                top, total, wanted = state
                logits = _logits(hidden, part, terms.softcap)
                new_top = jnp.maximum(top, logits.max(axis=-1))
                total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(axis=-1)
                hits = jnp.where(_is_target(targets, start, size), logits, 0.0)
                wanted += (1 - terms.label_smoothing) * hits.sum(axis=-1)
                if terms.label_smoothing:
                    wanted += terms.label_smoothing / vocab_size * logits.sum(axis=-1)
                return None, (new_top, total, wanted)

            return _over_tokens(tile, None, state, arrays, _unrolled(columns, terms.vocab_chunk))[1]

        zeros = jnp.zeros(arrays[1].shape)
        state = _over_vocabulary(over_tokens, (zeros - jnp.inf, zeros, zeros), columns, terms.vocab_chunk)
        top, total, wanted = (_joined(x, tokens) for x in state)
        if tensor:
            local_top, top = top, jax.lax.pmax(top, tensor)
            total, wanted = jax.lax.psum((total * jnp.exp(local_top - top), wanted), tensor)
        log_z = top + jnp.log(total)
        return log_z - wanted, log_z

    return _per_device(share, kernel, hidden, targets, sums_kernel=False)


def _fwd(
    hidden: Array, kernel: Array, targets: Array, terms: Terms
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array, Array]]:
    nll, log_z = cross_entropy(hidden, kernel, targets, terms)
    return (nll, log_z), (hidden, kernel, targets, log_z)


def _bwd(terms: Terms, saved: tuple[Array, ...], g: tuple[Array, Array]) -> tuple[Array, Array, None]:
    hidden, kernel, targets, log_z = saved
    dtype, vocab_size, smoothing = kernel.dtype, kernel.shape[1], terms.label_smoothing

    def share(batch: tuple[str, ...], tensor: tuple[str, ...], kernel: Array, hidden: Array, *arrays: Array) -> Any:
        tokens, columns = hidden.shape[0], kernel.shape[1]
        arrays = (hidden, _local_targets(arrays[0], tensor, columns), *arrays[1:])
        arrays = tuple(_in_chunks(x, terms.token_chunk) for x in arrays)

        def over_tokens(carry: tuple[Array, Array], start: Any, size: int) -> tuple[Array, Array]:
            dkernel, dhidden = carry
            part = _columns(kernel, start, size, hidden.dtype)

            def tile(dpart: Array, dhidden: Array, hidden: Array, targets: Array, log_z: Array, *g: Array) -> Any:
                (g_nll, g_log_z), logits = g, _logits(hidden, part, terms.softcap)
                wanted = jnp.where(_is_target(targets, start, size), 1 - smoothing, 0.0) + smoothing / vocab_size
                dlogits = jnp.exp(logits - log_z[:, None]) * (g_nll + g_log_z)[:, None] - wanted * g_nll[:, None]
                if terms.softcap is not None:
                    dlogits *= 1 - jnp.square(logits / terms.softcap)
                dlogits = jax.lax.optimization_barrier(dlogits.astype(hidden.dtype))
                dhidden += jnp.einsum("CV,DV->CD", dlogits, part, preferred_element_type=jnp.float32)
                dpart += row_major(jnp.dot(swap_last(hidden), dlogits, preferred_element_type=jnp.float32))
                return dpart, dhidden

            zeros, unrolled = jnp.zeros(part.shape, jnp.float32), _unrolled(columns, terms.vocab_chunk)
            dpart, dhidden = _over_tokens(tile, zeros, dhidden, arrays, unrolled)
            return jax.lax.dynamic_update_slice_in_dim(dkernel, dpart.astype(dkernel.dtype), start, axis=1), dhidden

        # What devices have yet to add up is not rounded.
        dkernel = jnp.zeros(kernel.shape, jnp.float32 if batch else kernel.dtype)
        dhidden = jnp.zeros(arrays[0].shape, jnp.float32)
        dkernel, dhidden = _over_vocabulary(over_tokens, (dkernel, dhidden), columns, terms.vocab_chunk)
        dhidden = _joined(dhidden, tokens)
        dhidden = jax.lax.psum(dhidden, tensor) if tensor else dhidden
        return dhidden.astype(hidden.dtype), jax.lax.psum(dkernel, batch) if batch else dkernel

    dhidden, dkernel = _per_device(share, kernel, hidden, targets, log_z, *g, sums_kernel=True)
    return dhidden, dkernel.astype(dtype), None


cross_entropy.defvjp(_fwd, _bwd)

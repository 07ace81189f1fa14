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


def _scan_tokens(
    body: Callable[..., Any], carry: Any, arrays: tuple[Array, ...], chunk: int, unrolled: int
) -> tuple[Any, Any]:
    """Scans `body(carry, *arrays)` over even chunks of the arrays' first axis; the last one is filled up with zeros."""
    tokens = arrays[0].shape[0]
    count = -(-tokens // chunk)
    pad = -tokens % count

    def split(x: Array) -> Array:
        return jnp.pad(x, ((0, pad), *((0, 0),) * (x.ndim - 1))).reshape(count, -1, *x.shape[1:])

    unroll = count if count <= unrolled else 1
    carry, outs = jax.lax.scan(lambda c, xs: body(c, *xs), carry, tuple(map(split, arrays)), unroll=unroll)
    return carry, jax.tree.map(lambda y: y.reshape(-1, *y.shape[2:])[:tokens], outs)


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
    return jax.lax.dynamic_slice_in_dim(kernel, start, size, axis=1).astype(dtype)


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
        columns = kernel.shape[1]

        def body(_: None, hidden: Array, targets: Array) -> tuple[None, tuple[Array, ...]]:
            def tile(carry: tuple[Array, ...], start: Any, size: int) -> tuple[Array, ...]:
                top, total, wanted = carry
                logits = _logits(hidden, _columns(kernel, start, size, hidden.dtype), terms.softcap)
                new_top = jnp.maximum(top, logits.max(axis=-1))
                total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(axis=-1)
                hits = jnp.where(_is_target(targets, start, size), logits, 0.0)
                wanted += (1 - terms.label_smoothing) * hits.sum(axis=-1)
                if terms.label_smoothing:
                    wanted += terms.label_smoothing / vocab_size * logits.sum(axis=-1)
                return new_top, total, wanted

            zeros = jnp.zeros(targets.shape)
            return None, _over_vocabulary(tile, (zeros - jnp.inf, zeros, zeros), columns, terms.vocab_chunk)

        arrays = (hidden, _local_targets(targets, tensor, columns))
        unrolled = _unrolled(columns, terms.vocab_chunk)
        _, (top, total, wanted) = _scan_tokens(body, None, arrays, terms.token_chunk, unrolled)
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
        columns = kernel.shape[1]

        def body(dkernel: Array, hidden: Array, targets: Array, log_z: Array, g_nll: Array, g_log_z: Array) -> Any:
            def tile(carry: tuple[Array, Array], start: Any, size: int) -> tuple[Array, Array]:
                dkernel, dhidden = carry
                part = _columns(kernel, start, size, hidden.dtype)
                logits = _logits(hidden, part, terms.softcap)
                wanted = jnp.where(_is_target(targets, start, size), 1 - smoothing, 0.0) + smoothing / vocab_size
                dlogits = jnp.exp(logits - log_z[:, None]) * (g_nll + g_log_z)[:, None] - wanted * g_nll[:, None]
                if terms.softcap is not None:
                    dlogits *= 1 - jnp.square(logits / terms.softcap)
                dlogits = jax.lax.optimization_barrier(dlogits.astype(hidden.dtype))
                dhidden += jnp.einsum("CV,DV->CD", dlogits, part, preferred_element_type=jnp.float32)
                product = row_major(jnp.dot(swap_last(hidden), dlogits, preferred_element_type=jnp.float32))
                # In place: a sum of whole gradients would need a second one.
                product += jax.lax.dynamic_slice_in_dim(dkernel, start, size, axis=1)
                return jax.lax.dynamic_update_slice_in_dim(dkernel, product, start, axis=1), dhidden

            carry = (dkernel, jnp.zeros(hidden.shape, jnp.float32))
            dkernel, dhidden = _over_vocabulary(tile, carry, columns, terms.vocab_chunk)
            dhidden = jax.lax.psum(dhidden, tensor) if tensor else dhidden
            return dkernel, dhidden.astype(hidden.dtype)

        arrays = (hidden, _local_targets(arrays[0], tensor, columns), *arrays[1:])
        zeros, unrolled = jnp.zeros(kernel.shape, jnp.float32), _unrolled(columns, terms.vocab_chunk)
        dkernel, dhidden = _scan_tokens(body, zeros, arrays, terms.token_chunk, unrolled)
        return dhidden, jax.lax.psum(dkernel, batch) if batch else dkernel

    dhidden, dkernel = _per_device(share, kernel, hidden, targets, log_z, *g, sums_kernel=True)
    return dhidden, dkernel.astype(dtype), None


cross_entropy.defvjp(_fwd, _bwd)
